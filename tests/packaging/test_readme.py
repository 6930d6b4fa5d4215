"""The README's first example runs as it stands, and its picture is text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example_of_use_runs_as_it_stands(tmp_path: Path) -> None:
    section = re.search(r"^## Use$(.*?)^## ", README, re.M | re.S)
    assert section is not None
    examples = re.findall(r"```python\n(.*?)```", section[1], re.S)
    assert examples
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "17 of 17 blocks fused" in done.stdout and done.stderr == ""
