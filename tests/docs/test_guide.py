"""Each page of the guide runs as it stands, and prints what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
CODE = re.compile(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.S)


@pytest.mark.parametrize("page", ["explain_and_verify", "own_block", "export"])
def test_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (GUIDE / f"{page}.md").read_text()
    namespace: dict[str, object] = {"__name__": "page"}
    examples = CODE.findall(text)
    assert examples
    for code, shown in examples:
        exec(compile(code, f"{page}.md", "exec"), namespace)
        printed = capsys.readouterr().out
        assert printed == shown or not shown


def test_every_example_of_the_guide_is_run() -> None:
    with_code = {page.stem for page in GUIDE.glob("*.md") if "```python" in page.read_text()}
    assert with_code == {"explain_and_verify", "own_block", "export"}
