"""A branch is F, and a step of it is one fused call, whatever the step size and time; its changes are seen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import NotFusable, StageModules, fuse
from resnet_fused.backends import folding, prepared
from resnet_fused.flows import Branch
from resnet_fused.flows.branch import stages_of
from resnet_fused.flows.measure import block_calls
from resnet_fused.models.resnet import BasicBlock

CHAINS: dict[str, Callable[[], nn.Sequential]] = {
    "post": lambda: nn.Sequential(conv(4, 6), nn.BatchNorm2d(6), nn.SiLU(), conv(6, 4), nn.BatchNorm2d(4)),
    "activated": lambda: nn.Sequential(conv(4, 4), nn.GELU()),
    "pre": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), nn.Identity(), nn.ReLU(), conv(6, 4)),
}


def conv(source: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(source, width, 3, padding=1)


def chain(name: str, seed: int = 0) -> nn.Sequential:
    """With running statistics and affine parameters that differ from their beginnings."""
    torch.manual_seed(seed)
    net = CHAINS[name]()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def picture(dtype: torch.dtype = torch.float64, size: int = 5) -> Tensor:
    return torch.randn(2, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


# of the largest value of F: a chain of two convolutions rounds a few times; bfloat16 has 8 bits, float32 24
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CHAINS)
def test_f_and_step(name: str, dtype: torch.dtype, grad: bool) -> None:
    net, x = chain(name).to(dtype), picture(dtype)
    exact = copy.deepcopy(net).double()(x.double()).detach()
    branch = Branch.of(net)
    with torch.set_grad_enabled(grad):
        for dt, skip in ((1.0, 1.0), (0.1, 1.0), (-0.3, 0.5), (torch.tensor(0.1, dtype=dtype), 1.0), (0.1, 1.0)):
            expected = {True: skip * x.double() + float(dt) * exact, False: float(dt) * exact}
            got = {True: branch.step(x, dt, skip_scale=skip), False: branch(x, scale=dt)}
            for which, out in got.items():
                assert out.dtype == dtype
                limit = TOLERANCE[dtype] * float(expected[which].abs().max())
                assert float((out.detach() - expected[which]).abs().max()) <= limit


@pytest.mark.parametrize("name", CHAINS)
def test_time_is_a_bias_affine_in_t(name: str) -> None:
    net, x, t = chain(name).double(), picture(), 0.7
    branch = Branch.of(copy.deepcopy(net), time_dependent=True)
    assert branch.time_biases is not None
    assert torch.equal(branch(x, t), branch(x))  # zero at first
    torch.manual_seed(1)
    for c in branch.time_biases:
        nn.init.normal_(c)
    shifts = iter(branch.time_biases)
    with torch.no_grad():
        for stage in stages_of(net)[0]:
            target = stage.conv if stage.norm is None else stage.norm
            target.bias.add_(t * next(shifts))
        # float64, a few roundings
        torch.testing.assert_close(branch(x, t), net(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(branch.step(x, 0.2, t), x + 0.2 * net(x), rtol=1e-12, atol=1e-12)


def test_time_channel_of_chen_et_al_is_the_same_bias_away_from_the_border() -> None:
    """A channel that holds t, convolved with ones, adds 9 t inside a 3x3 convolution's padding, 4 t in its corners."""
    x, t = picture(), 0.7
    first = conv(4, 4).double()
    weight = torch.ones(4, 1, 3, 3, dtype=torch.float64)
    appended = F.conv2d(
        torch.cat([x, torch.full_like(x[:, :1], t)], 1), torch.cat([first.weight, weight], 1), first.bias, padding=1
    )
    branch = Branch(first, time_dependent=True).double()
    assert branch.time_biases is not None
    nn.init.constant_(branch.time_biases[0], 9.0)
    found = branch(x, t)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], appended[inside], rtol=1e-12, atol=1e-12)  # float64
    assert not torch.allclose(found, appended)


def test_gradients_of_dt_t_scale_and_parameters() -> None:
    branch = Branch.of(chain("post").double(), time_dependent=True)
    x = picture(size=3)[:1].requires_grad_()
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2, 0.7)]
    parameters = list(branch.parameters())

    def run(x: Tensor, dt: Tensor, t: Tensor, skip: Tensor, *_: Tensor) -> Tensor:
        return branch.step(x, dt, t, skip)

    # gradcheck's own tolerances, float64
    assert torch.autograd.gradcheck(run, (x, *values, *parameters))


def test_a_resnet_block_is_one_euler_step() -> None:
    """ResNet v1: its ReLU behind the addition apart; v2 (pre-activation): to the bit the same call."""
    torch.manual_seed(0)
    block = BasicBlock(4, 4).eval()
    branch = Branch(block.conv1, block.bn1, block.relu, block.conv2, block.bn2)
    x = picture(torch.float32)
    fused = fuse(copy.deepcopy(block))
    with torch.no_grad():
        # the two round once more or less, in float32
        torch.testing.assert_close(torch.relu(branch.step(x, 1.0)), fused(x), rtol=1e-6, atol=1e-6)
    pre = Branch.of(chain("pre"))
    torch.testing.assert_close(pre.step(x, 1.0), x + pre.net(x), rtol=1e-5, atol=1e-5)  # float32


def test_each_is_one_fused_call() -> None:
    branch, x = Branch.of(chain("post")), picture(torch.float32)
    assert block_calls(lambda: branch(x)) == 1
    assert block_calls(lambda: branch.step(x, 0.1, skip_scale=0.5)) == 1


def test_evaluation_packs_once_for_each_step_size(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[str] = []
    for module, name in ((prepared, "_prepare"), (folding, "_fold")):
        original = getattr(module, name)

        def noted(*args: object, original: Callable[..., object] = original) -> object:
            packed.append("packed")
            return original(*args)

        monkeypatch.setattr(module, name, noted)
    branch, x = Branch.of(chain("post"), time_dependent=True), picture(torch.float32)
    with torch.no_grad():
        for _ in range(3):
            for dt in (0.1, 0.2, torch.tensor(0.25)):
                branch.step(x, dt, 0.5)
            branch(x, 0.5)
    assert len(packed) == 4


def test_what_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    branch, x = Branch.of(chain("post").double(), time_dependent=True), picture()
    assert branch.time_biases is not None

    def now() -> Tensor:
        with torch.no_grad():
            return branch.step(x, 0.5, 1.0)

    seen = [now()]
    branch.net[0].weight.data.mul_(1.5)
    seen.append(now())
    branch.time_biases[1].data.add_(1)  # in place: moves no version counter
    seen.append(now())
    branch.net[4].bias.data.add_(1)
    seen.append(now())
    branch.net[2] = nn.ReLU()
    seen.append(now())
    branch.train()
    seen.append(now())
    assert all(not torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])
    for copied in (copy.deepcopy(branch.eval()), pickle.loads(pickle.dumps(branch))):
        assert torch.equal(copied.step(x, 0.5, 1.0), branch.step(x, 0.5, 1.0))


def test_what_evaluation_keeps_has_no_part_in_a_graph() -> None:
    branch, x = Branch.of(chain("post").double(), time_dependent=True), picture()
    assert branch.time_biases is not None
    with torch.no_grad():
        branch.step(x, 0.5, 1.0)
    branch.step(x, 0.5, 1.0).sum().backward()
    assert all(c.grad is not None for c in branch.time_biases)


def test_a_tensor_dt_that_changes_is_seen() -> None:
    branch, x = Branch.of(chain("post").double()), picture()
    dt = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    with torch.no_grad():
        branch.step(x, dt)
        dt.fill_(0.3)
        torch.testing.assert_close(branch.step(x, dt), branch.step(x, 0.3), rtol=0, atol=0)


def test_jacobian_products_are_those_of_pytorch() -> None:
    branch, x, v = Branch.of(chain("post").double()), picture(), picture().flip(0)
    value, jv = branch.jvp(x, v)
    expected = torch.func.jvp(branch.net, (x,), (v,))
    torch.testing.assert_close((value, jv), expected, rtol=1e-12, atol=1e-12)  # float64
    named = Branch.of(branch.net, backend="native")
    torch.testing.assert_close(named.jvp(x, v)[1], jv, rtol=0, atol=0)


def test_stages_by_name() -> None:
    x, first, last = picture(torch.float32), conv(4, 6), conv(6, 4)
    branch = Branch.of([StageModules(first, None, "relu"), StageModules(last, None, None)])
    torch.testing.assert_close(branch(x), last(F.relu(first(x))), rtol=1e-5, atol=1e-5)  # float32
    branch = Branch.of([StageModules(first, None, F.silu), StageModules(last, None, nn.ReLU())], order="pre")
    torch.testing.assert_close(branch(x), last(F.relu(first(F.silu(x)))), rtol=1e-5, atol=1e-5)


def test_under_compile() -> None:
    branch, x = Branch.of(chain("post")), picture(torch.float32)
    compiled = torch.compile(lambda x: branch.step(x, 0.1), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), branch.step(x, 0.1), rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("net", "says"),
    [
        ([nn.Linear(4, 4)], "a branch has Linear; accepted: nn.Conv2d"),
        ([nn.ReLU(), conv(4, 4), nn.ReLU()], "a branch is a chain of conv, .* given: ReLU, Conv2d, ReLU"),
        ([conv(4, 4), nn.ReLU(), nn.BatchNorm2d(4)], "given: Conv2d, ReLU, BatchNorm2d"),
        ([], "given: nothing"),
        ([nn.Conv1d(4, 4, 3)], "is Conv1d; accepted: nn.Conv2d itself"),
    ],
)
def test_refuses_other_chains(net: list[nn.Module], says: str) -> None:
    with pytest.raises(NotFusable, match=says):
        Branch(*net)


def test_bad_arguments_say_what_is_accepted() -> None:
    branch, x = Branch.of(chain("post")), picture(torch.float32)
    with pytest.raises(ValueError, match="dt is nan; accepted: finite"):
        branch.step(x, float("nan"))
    with pytest.raises(ValueError, match=r"dt is tensor\(inf\)"):
        branch.step(x, torch.tensor(float("inf")))
    with pytest.raises(TypeError, match="x must be a tensor, got str"):
        branch("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="skip path gives 4x5x5 but the branch gives 6x5x5"):
        Branch(conv(4, 6)).step(x, 0.1)
    timed = Branch.of(chain("post"), time_dependent=True)
    with pytest.raises(ValueError, match=r"one value for the whole batch, got \(2,\)"):
        timed(x, torch.zeros(2))
    with pytest.raises(ValueError, match="norm of stage 0 takes the batch's statistics"):
        Branch.of(chain("post")).train().jvp(x, x)
