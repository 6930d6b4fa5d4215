"""The package's own exceptions."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the block; the message carries its reason."""


class NotFusable(ValueError):  # noqa: N818 (a verdict that callers act on, not a failure)
    """A module cannot be expressed as a fused block; the message names the part. Raised by adapters."""
