"""Graphs of a fused model run where this package is absent, unless the fused operators are asked for."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.padding import MODES
from torch import Tensor, nn

import resnet_fused
from resnet_fused import BlockParams, BlockSpec, StageParams, StageSpec, export_fused, functional, fuse, models
from resnet_fused.modules.fused_block import FusedModule

# The exported operations are eager's own, in eager's order, on the same tensors: nothing may differ.
EXACT = {"rtol": 0.0, "atol": 0.0}
# Other runtimes fold the norms into the weights and sum in an order of their own. A sum of resnet18 has up to 4608
# products and rounds by some sqrt(4608) = 68 times 2^-24, or 4e-6; 20 of them by sqrt(20) times that. (Seen: 2e-6.)
OTHER_RUNTIME = 2e-5

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "resnet_fused":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
"""


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 33, 40, generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module) -> nn.Module:
    """Norms that do something in evaluation."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return model


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return shaken(models.resnet18(num_classes=5, fused=False)).eval()


def small(**given: object) -> nn.Module:
    torch.manual_seed(0)
    return shaken(models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=3, **given)).eval()  # type: ignore[arg-type]


def padded(mode: str) -> nn.Module:
    model = small()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode
    return model


def gated() -> nn.Module:
    """Blocks with squeeze-excitation: a gate that is a function of the branch's mean."""
    file = Path(__file__).parents[2] / "examples" / "squeeze_excitation.py"
    spec = importlib.util.spec_from_file_location("squeeze_excitation", file)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    resnet_fused.register_block(example.SqueezeExcitationBlock, example.describe)
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3)
    return shaken(nn.Sequential(stem, *(example.SqueezeExcitationBlock(8) for _ in range(2)))).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "post-activation": small,
    "pre-activation": lambda: small(order="pre"),
    "gates": gated,
    **{f"padding {mode}": lambda mode=mode: padded(mode) for mode in MODES},  # type: ignore[misc]
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    eager = make()
    fused = fuse(copy.deepcopy(eager))
    assert any(isinstance(module, FusedModule) for module in fused.modules())
    return eager, fused


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "resnet_fused" in str(node.target)]


def without_the_package(code: str, *files: Path) -> str:
    """Runs code where resnet_fused cannot be imported; what it printed."""
    command = [sys.executable, "-c", ABSENT + code, *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=files[0].parent, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


# --- torch.export ----------------------------------------------------------------------------------------------------


@every_model
def test_programs_hold_pytorchs_operations(make: Callable[[], nn.Module]) -> None:
    eager, fused = both(make)
    program = torch.export.export(fused, (pictures(),))
    assert ours(program) == []
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pictures()), eager(pictures()), **EXACT)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_strict_export_without_gradients(backend: str) -> None:
    """Dynamo reads the code that decides, and a backend asked for by name is no wish for its operators in a file."""
    fused = fuse(small(), backend=backend)
    with torch.no_grad():
        assert ours(torch.export.export(fused, (pictures(),), strict=True)) == []


def test_any_number_of_pictures() -> None:
    eager, fused = both(small)
    program = torch.export.export(fused, (pictures(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(program.module()(pictures(batch)), eager(pictures(batch)), **EXACT)


@every_model
def test_programs_train_as_eager(make: Callable[[], nn.Module]) -> None:
    """Outputs, gradients and running statistics of a program made in training mode."""
    eager, fused = (model.train() for model in both(make))
    program = torch.export.export(fused, (pictures(),)).module()
    outputs = [model(pictures()) for model in (program, eager)]
    torch.testing.assert_close(*outputs, **EXACT)
    for out in outputs:
        out.square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (program, eager)]
    torch.testing.assert_close(*gradients, **EXACT)
    torch.testing.assert_close(dict(program.named_buffers()), dict(eager.named_buffers()), **EXACT)


# --- the fused operators, asked for ----------------------------------------------------------------------------------


@every_model
def test_fused_operators_are_kept_where_asked(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    eager, fused = both(make)
    with torch.no_grad(), export_fused():
        program = torch.export.export(fused, (pictures(),))
    assert ours(program)
    torch.export.save(program, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2").module()
    # other orders of float32 sums: ten ulp of the largest value in each of at most ten convolutions
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures()), eager(pictures()), rtol=1e-5, atol=1e-5)


def test_export_fused_ends_with_its_block() -> None:
    _, fused = both(small)
    with pytest.raises(KeyError), export_fused():
        with export_fused():
            pass
        assert ours(torch.export.export(fused, (pictures(),)))
        raise KeyError
    assert ours(torch.export.export(fused, (pictures(),))) == []


# --- where this package is absent ------------------------------------------------------------------------------------

RUN = """
x, out = torch.load(sys.argv[1]), []
out.append(torch.export.load(sys.argv[2]).module()(x))
out.append(torch.jit.load(sys.argv[3])(x))
torch.save(out, sys.argv[1] + ".out")
assert not any(name.startswith("resnet_fused") for name in sys.modules)
try:
    torch.export.load(sys.argv[4])
except RuntimeError:
    print("refused")
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_run_without_this_package(tmp_path: Path) -> None:
    """An exported program and a traced one; the program with fused operators is refused, not run as something else."""
    eager, fused = both(resnet18)
    x, program, traced, kept = (tmp_path / name for name in ("x.bin", "model.pt2", "model.pt", "fused.pt2"))
    torch.save(pictures(), x)
    with torch.no_grad():
        torch.export.save(torch.export.export(fused, (pictures(),)), program)
        torch.jit.save(torch.jit.trace(fused, pictures()), traced)
        with export_fused():
            torch.export.save(torch.export.export(small_fused(), (pictures(),)), kept)
        printed = without_the_package(RUN, x, program, traced, kept)
        for out in torch.load(f"{x}.out"):
            torch.testing.assert_close(out, eager(pictures()), **EXACT)
    assert printed == "refused\n"


def small_fused() -> nn.Module:
    return both(small)[1]


# --- ONNX ------------------------------------------------------------------------------------------------------------


def run_by_onnxruntime(file: Path, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(out)


def run_by_openvino(file: Path, x: Tensor) -> Tensor:
    openvino = pytest.importorskip("openvino")
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    return torch.from_numpy(compiled([x.numpy()])[0].copy())


RUNTIMES = {"onnxruntime": run_by_onnxruntime, "openvino": run_by_openvino}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """(the eager model, the fused model's file) by name; each is exported once."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export writes with it")
    made: dict[str, tuple[nn.Module, Path]] = {}

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in made:
            eager, fused = both(resnet18 if name == "resnet18" else MODELS[name])
            file = tmp_path_factory.mktemp("onnx") / "model.onnx"
            batch = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(fused, (pictures(),), file, dynamo=True, dynamic_shapes=batch, verbose=False)
            made[name] = eager, file
        return made[name]

    return get


NAMES = ("resnet18", "pre-activation", "gates", "padding reflect")
CASES = [(name, runtime) for name in NAMES for runtime in RUNTIMES]
CASES.append(("padding circular", "onnxruntime"))  # OpenVINO reads no ONNX of circular padding, fused or not


@pytest.mark.parametrize(("name", "runtime"), CASES)
def test_onnx(name: str, runtime: str, onnx_file: Callable[[str], tuple[nn.Module, Path]]) -> None:
    """With any number of pictures."""
    eager, file = onnx_file(name)
    for batch in (2, 3):
        with torch.no_grad():
            expected = eager(pictures(batch))
        found = RUNTIMES[runtime](file, pictures(batch))
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < OTHER_RUNTIME


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")
def test_onnx_in_training_mode_is_the_unfused_models() -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export writes with it")
    kinds = []
    for model in both(small):
        program = torch.onnx.export(model.train(), (pictures(),), dynamo=True, verbose=False)
        kinds.append([node.op_type for node in program.model.graph])
    assert kinds[0] == kinds[1]


def test_onnx_has_no_fused_operators() -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export writes with it")
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="resnet_fused"), export_fused():
        torch.onnx.export(small_fused(), (pictures(),), dynamo=True, verbose=False)


# --- tracing and quantisation ----------------------------------------------------------------------------------------


@every_model
def test_fx_takes_the_unfused_graph(make: Callable[[], nn.Module]) -> None:
    graphs = [torch.fx.symbolic_trace(model) for model in both(make)]
    assert graphs[0].code == graphs[1].code
    with torch.no_grad():
        torch.testing.assert_close(graphs[1](pictures()), graphs[0](pictures()), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning", "ignore:.*quantized tensor creation:UserWarning")
def test_fx_quantisation() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    results = []
    for model in both(small):
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (pictures(),))
        with torch.no_grad():
            prepared(pictures())  # calibrates
            quantised = convert_fx(prepared)
            results.append((quantised.code, quantised(pictures())))
    assert results[0][0] == results[1][0] and "quantize_per_tensor" in results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], **EXACT)


def test_pt2e_quantisation() -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    results = []
    for model in both(small):
        graph = torch.export.export(model, (pictures(),)).module()
        quantizer = xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config())
        prepared = pt2e.prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            prepared(pictures())  # calibrates
            quantised = pt2e.convert_pt2e(prepared)
            results.append(quantised(pictures()))
        assert any("quantize_per_tensor" in str(node.target) for node in quantised.graph.nodes)
    torch.testing.assert_close(results[1], results[0], **EXACT)


# --- functions -------------------------------------------------------------------------------------------------------


class OfFunctions(nn.Module):
    """A user's own forward over `functional`."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.backend = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), backend
        shaken(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        params = BlockParams((StageParams(self.conv.weight, self.conv.bias),))
        chain = BlockSpec((StageSpec(padding=(1, 1), norm=False),))
        gated = functional.residual_block(x, params, chain, gate=lambda mean: mean.sigmoid(), backend=self.backend)
        pooled = functional.residual_block_max_pool2d(gated, params, chain, 3, 2, 1, backend=self.backend)
        return functional.batch_norm_act(pooled, self.bn, act="silu", backend=self.backend)


def trace(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    traced = torch.jit.trace(model, x)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert not [kind for kind in kinds if kind.startswith(("resnet_fused", "prim::Python"))]
    return traced


def export(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (x,))
    assert ours(program) == []
    return program.module()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")  # the checks of shapes, once
@pytest.mark.parametrize("make", [trace, export])
def test_functions_are_pytorchs_operations_under_auto(make: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    expected = OfFunctions("eager")(pictures())
    torch.testing.assert_close(make(OfFunctions("auto"), pictures())(pictures()), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
def test_traced_functions_take_other_batches() -> None:
    traced = trace(OfFunctions("auto"), pictures())
    torch.testing.assert_close(traced(pictures(3)), OfFunctions("eager")(pictures(3)), **EXACT)


def test_functions_keep_a_backend_asked_for_by_name() -> None:
    assert ours(torch.export.export(OfFunctions("native"), (pictures(),)))
