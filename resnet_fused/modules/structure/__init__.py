"""Blocks of classes that no adapter knows, by what their forward does: traced, matched, proven.

trace (torch.fx, as a list of operations) -> match (which of them are fused calls) -> recipe (by the children's names)
-> proof (against the block itself, in float64) -> fused (the class that it gets, what is kept).
"""

from resnet_fused.modules.structure.fused import (
    Found,
    FusedByStructure,
    fuse_by_structure,
    matched_words,
    reason_against,
)

__all__ = ["Found", "FusedByStructure", "fuse_by_structure", "matched_words", "reason_against"]
