"""An error in one line, as the record keeps it."""

from __future__ import annotations

import traceback
from pathlib import Path


def error_text(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({Path(f.filename).name}:{f.lineno})" for f in where)
    return f"{type(error).__name__}: {str(error)[:2000]}{place}"
