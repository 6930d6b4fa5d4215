"""One pass between convolutions, and the bytes that it must move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassShape:
    channels: int
    size: tuple[int, int]
    residual: bool

    def __str__(self) -> str:
        return f"bn{' + residual' if self.residual else ''} + ReLU, {self.channels}x{self.size[0]}x{self.size[1]}"

    def bytes(self, direction: str, batch: int) -> float:
        """What the fused passes must move: 16-bit activations, and a mask of one bit per value that training keeps.

        Statistics read x; normalising reads x and the residual and writes the output. Backward reads dout, x and the
        mask for its sums, and again to write the gradients of x and of the residual.
        """
        values = batch * self.channels * self.size[0] * self.size[1]
        evaluation, forward, backward = 2 + self.residual, 3 + self.residual, 5 + self.residual
        if direction == "evaluation":
            return 2 * values * evaluation
        both = direction == "training"
        return values * (2 * (forward + both * backward) + (1 + 2 * both) / 8)
