"""Models that two processes train together, wrapped in every way: each run gives what its process got.

A module of its own, because a spawned process has to import it by name. All processes go through `RUNS` in order, since
each of them waits for the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.nn.parallel import DistributedDataParallel

from resnet_fused import explain, fuse, unfuse
from resnet_fused.models.resnet import BasicBlock, ResNet

WORLD = 2
Results = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]
OWN_NAMES = ("_checkpoint_wrapped_module.", "module.")  # which wrappers put before a module's


def net(seed: int = 0) -> nn.Module:
    """A stem, an identity block and one with a projection, a pooling and a classifier."""
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 0, 0), num_classes=3, in_channels=6).double()


def pictures(step: int, dtype: torch.dtype = torch.float64, rank: int | None = None) -> Tensor:
    """Of this process, or another."""
    generator = torch.Generator().manual_seed(WORLD * step + (dist.get_rank() if rank is None else rank))
    return torch.randn(3, 6, 16, 16, dtype=torch.float64, generator=generator).to(dtype)


def same_pictures() -> Tensor:
    return torch.randn(2, 6, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(99))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean() if x.dtype == torch.bfloat16 else model(x).square().mean()


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 3) -> Results:
    """Each step's loss, the parameters that were learned and this process's buffers."""
    optimizer = optimizer or sgd(model.parameters())
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, pictures(step))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return {"losses": torch.stack(losses)} | whole(model.named_parameters()) | whole(model.named_buffers())


def whole(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Under the names of the unwrapped model; sharded tensors gathered."""
    found = {}
    for name, tensor in named:
        for prefix in OWN_NAMES:
            name = name.replace(prefix, "")
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = full.detach().clone()
    return found


def evaluated(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        return model.eval()(same_pictures().to(dtype))


def rows(model: nn.Module) -> list[tuple[str, str]]:
    return [(row.backend, row.reason) for row in explain(model)]


# --- how a model is wrapped -------------------------------------------------------------------------------------------

mesh: DeviceMesh  # of both processes


def ddp(model: nn.Module, **settings: Any) -> nn.Module:
    return DistributedDataParallel(model, **settings)


def hooked(model: nn.Module, hook: Callable[..., Any]) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, hook)
    return wrapped


def with_spare_block(model: nn.Module) -> nn.Module:
    """A block that the loss does not reach."""
    model.spare = fuse(BasicBlock(4, 4).double())
    return model


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    for block in [module for module in model.modules() if isinstance(module, BasicBlock)]:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def root_alone(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def layers_sharded(model: nn.Module) -> nn.Module:
    """Beneath the blocks: their own hooks gather the parameters, so no block can be fused."""
    for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        fully_shard(conv, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flattened(model: nn.Module) -> nn.Module:
    """By the first FullyShardedDataParallel, between whose calls no parameter has its shape."""
    policy = ModuleWrapPolicy({BasicBlock})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BasicBlock))
    return model


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "unfused": lambda: ddp(net()),
    "fused before": lambda: ddp(fuse(net())),
    "fused after": lambda: fuse(ddp(net())),
    "static graph": lambda: ddp(fuse(net()), static_graph=True),
    "unused parameters": lambda: ddp(with_spare_block(fuse(net())), find_unused_parameters=True),
    "bucket views": lambda: ddp(fuse(net().to(memory_format=torch.channels_last)), gradient_as_bucket_view=True),
    "communication hook": lambda: hooked(fuse(net()), default_hooks.allreduce_hook),
    "sharded": lambda: sharded(fuse(net())),
    "sharded before": lambda: fuse(sharded(net())),
    "sharded and kept": lambda: sharded(fuse(net()), reshard_after_forward=False),
    "sharded, low memory": lambda: sharded(fuse(net(), memory="low")),
    "sharded as a whole": lambda: root_alone(fuse(net())),
    "sharded by layers": lambda: sharded_by_layers(),
    "sharded, then unfused": lambda: unfuse(fuse(sharded(net()))),
    "replicated": lambda: fuse(replicate(net(), mesh=mesh)),
}


def sharded_by_layers() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is fused
        return fuse(layers_sharded(net()))


# --- what else they do with it ----------------------------------------------------------------------------------------


def accumulated(model: nn.Module, sharding: bool = False) -> Results:
    """The gradients of three batches, of which only the last one communicates."""
    for step in range(2):
        if sharding:
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            loss(model, pictures(step)).backward()
        else:
            with model.no_sync():  # type: ignore[operator]
                loss(model, pictures(step)).backward()
    if sharding:
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
    loss(model, pictures(2)).backward()
    return whole((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def synchronised_alone() -> Results:
    """One process with everybody's pictures, whose losses all count alike."""
    model = net()
    optimizer = sgd(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss(model, torch.cat([pictures(step, rank=rank) for rank in range(WORLD)])).backward()
        optimizer.step()
    return whole(model.named_parameters()) | whole(model.named_buffers())


def joined(model: nn.Module) -> Results:
    """Of processes with unequal numbers of batches."""
    optimizer = sgd(model.parameters())
    with Join([model]):  # type: ignore[list-item]
        for step in range(1 + dist.get_rank()):
            optimizer.zero_grad()
            loss(model, pictures(step)).backward()
            optimizer.step()
    return whole(model.named_parameters()) | {"evaluated": evaluated(model)}


def zero_redundancy(model: nn.Module) -> Results:
    """Each process steps its share of the parameters and sends it to the others; also while the model evaluates."""
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    results = train(model, optimizer)
    results["evaluated"] = evaluated(model)
    loss(model, pictures(0)).backward()
    optimizer.step()
    return results | {"evaluated again": evaluated(model)}


def in_bfloat16(fused: bool) -> Results:
    """PyTorch's batch norm takes bfloat16 parameters beside bfloat16 statistics only, on the CPU."""
    model = net().float()
    for buffer in model.buffers():
        buffer.data = buffer.data.bfloat16() if buffer.is_floating_point() else buffer
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(fuse(model) if fused else model, mp_policy=policy)
    value = loss(model, pictures(0, torch.bfloat16))
    value.backward()
    gradients = whole((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {"gradients": torch.cat([gradient.flatten().double() for gradient in gradients.values()])}


def exact_gradients() -> Results:
    model = ddp(net())
    loss(model, pictures(0, torch.bfloat16).double()).backward()
    return {"gradients": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])}


def written_while_sharded() -> Results:
    """Evaluation after a write to one value of a shard, beside that of a model which knows nothing yet."""
    model = sharded(fuse(net().float())).eval()
    results: Results = {"before": evaluated(model, torch.float32)}
    for name in ("conv1.weight", "bn2.bias"):
        shard = model.get_submodule("layer2.0").get_parameter(name).detach().to_local().view(-1)  # type: ignore[operator]
        shard[len(shard) // 2 + 5] += 3
        results[f"after {name}"] = evaluated(model, torch.float32)
        model.train().eval()  # forgets what was prepared
        results[f"afresh {name}"] = evaluated(model, torch.float32)
    return results


def explained() -> Results:
    """What `explain` says of shards, of layers on their own, and of parameters that stay distributed."""
    shards = fuse(sharded(net()))
    evaluated(shards)
    distributed = fuse(distribute_module(BasicBlock(4, 4), mesh))
    x = DTensor.from_local(torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)), mesh, [Replicate()])
    return {
        "gathered": [block.fused_describe().params.gathered for block in (shards.layer1[0], fuse(net()).layer1[0])],
        "sharded": rows(shards),
        "classes": [type(module).__name__ for module in shards.modules() if type(module).__name__.startswith("FSDP")],
        "unfused": [type(module).__name__ for module in unfuse(shards).modules()],
        "never fused": [type(module).__name__ for module in sharded(net()).modules()],
        "layers": rows(sharded_by_layers()),
        "flattened": rows(flattened(fuse(net()))),
        "distributed": rows(distributed),
        "distributed, fused": distributed(x).full_tensor(),
        "distributed, unfused": unfuse(distributed)(x).full_tensor(),
    }


STATES: dict[str, Wrap] = {
    "plain": lambda model: model,
    "fused": fuse,
    "ddp": lambda model: ddp(fuse(model)),
    "sharded": lambda model: sharded(fuse(model)),
    "sharded, unfused": lambda model: sharded(model),
}


def states() -> Results:
    """A fused model's state, saved in shards and loaded into each of `STATES`, and given to it as a whole."""
    folder = [str(Path(folder_of_runs) / "state")]
    source = sharded(fuse(net()))
    train(source, steps=1)
    state = get_model_state_dict(source)
    dcp.save({"model": state}, checkpoint_id=folder[0])
    results: Results = {
        "names": list(state),
        "names of its own": list(net().state_dict()),
        "saved": whole(state.items()),
    }
    options = StateDictOptions(full_state_dict=True)
    entire = get_model_state_dict(source, options=options)
    for name, wrap in STATES.items():
        target = wrap(net(1))
        given = get_model_state_dict(target)
        dcp.load({"model": given}, checkpoint_id=folder[0])
        set_model_state_dict(target, given)
        results[f"loaded into {name}"] = whole(get_model_state_dict(target).items())
        target = wrap(net(1))
        set_model_state_dict(target, dict(entire), options=options)  # adds prefixes to what it is given
        results[f"given to {name}"] = whole(get_model_state_dict(target).items())
    return results


folder_of_runs: str
RUNS: dict[str, Callable[[], Results]] = {
    **{name: lambda make=make: train(make()) for name, make in TRAINED.items()},  # type: ignore[misc]
    "checkpointed, unfused": lambda: train(ddp(checkpointed(net()))),
    "checkpointed": lambda: train(ddp(checkpointed(fuse(net())))),
    "checkpointed, sharded": lambda: train(sharded(checkpointed(fuse(net())))),
    "flattened": lambda: {"losses": train(flattened(fuse(net())))["losses"]},
    "synchronised, unfused": synchronised_alone,
    "synchronised, sharded": lambda: train(sharded(fuse(nn.SyncBatchNorm.convert_sync_batchnorm(net())))),
    "accumulated, unfused": lambda: accumulated(ddp(net())),
    "accumulated": lambda: accumulated(ddp(fuse(net()))),
    "accumulated, sharded": lambda: accumulated(sharded(fuse(net())), sharding=True),
    "joined, unfused": lambda: joined(ddp(net())),
    "joined": lambda: joined(ddp(fuse(net()))),
    "zero redundancy, unfused": lambda: zero_redundancy(ddp(net())),
    "zero redundancy": lambda: zero_redundancy(ddp(fuse(net()))),
    "compressed, exact": lambda: train(ddp(net()), steps=1),
    "compressed, unfused": lambda: train(hooked(net(), default_hooks.fp16_compress_hook), steps=1),
    "compressed": lambda: train(hooked(fuse(net()), default_hooks.fp16_compress_hook), steps=1),
    "bfloat16, exact": exact_gradients,
    "bfloat16, unfused": lambda: in_bfloat16(fused=False),
    "bfloat16": lambda: in_bfloat16(fused=True),
    "written while sharded": written_while_sharded,
    "explained": explained,
    "states": states,
}


def compute(rank: int, folder: str) -> None:
    """This process's results of every run."""
    global mesh, folder_of_runs
    folder_of_runs = folder
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "Grad strides do not match bucket view strides")
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    torch.save({name: run() for name, run in RUNS.items()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
