"""What a block or a pass must compute and move, and the time that this takes at least."""

from __future__ import annotations

from collections.abc import Callable

from gpu_bench.setting import DIRECTIONS, DTYPE, Setting

from resnet_fused.triton_kernels.host import chips


def counted_costs(
    setting: Setting, chip: chips.Chip, measured: chips.Chip
) -> Callable[[str, int, str], dict[str, float]]:
    """Flops, bytes and floors of a block, empty without the cost model; bytes of a pass, and a copy's bandwidth."""
    try:
        from resnet_fused.triton_kernels.offline import cost_model
    except ImportError:
        cost_model = None  # type: ignore[assignment]
    passes = setting.passes()

    def costs(name: str, batch: int, direction: str) -> dict[str, float]:
        if name in passes:
            return {"pass_bytes": passes[name].bytes(direction, batch), "bandwidth": measured.bandwidth}
        if cost_model is None:
            return {}
        shape = setting.shapes()[name]
        fused = [p for d in DIRECTIONS[direction] for p in cost_model.fused(shape, d, batch, DTYPE, chip)]
        eager = [p for d in DIRECTIONS[direction] for p in cost_model.eager(shape, d, batch, DTYPE)]
        found: dict[str, float] = {
            "flops": sum(p.flops for p in fused),
            "fused_bytes": sum(p.bytes for p in fused),
            "eager_bytes": sum(p.bytes for p in eager),
            "measured_floor": cost_model.floor(fused, measured, DTYPE),
        }
        if chip.bandwidth and chip.half_peak:
            found["floor"] = cost_model.floor(fused, chip, DTYPE)
        return found

    return costs
