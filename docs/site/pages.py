"""Lays out what the site is built from: the files of docs/, and pages made of texts that stand elsewhere.

python docs/site/pages.py build/docs

Each fact stays where it is written: sections of README, texts beside their code, examples, the notebook. The site shows
them in other places, so their links are turned to where the targets are shown.
"""

from __future__ import annotations

import base64
import json
import os.path
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# a page from README: what stands before its first section, or the section of that name
SECTIONS = {
    "index.md": "",
    "guide/install.md": "Two commands",
    "guide/use.md": "Use",
    "measurements/claim.md": "The claim",
    "measurements/measured.md": "Measured",
    "guide/gpu.md": "On a GPU",
    "guide/limits.md": "Limits",
}
THEORY = "Theory"  # docs/theory.md has what README says there
_TITLES = {THEORY, *SECTIONS.values()}
# a page from a file elsewhere
FILES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "examples/index.md": "examples/README.md",
    "examples/tour.md": "examples/tour.ipynb",
    "examples/own_block.md": "examples/own_block.py",
    "examples/squeeze_excitation.md": "examples/squeeze_excitation.py",
    "examples/train.md": "examples/train.py",
    "internals/analysis.md": "resnet_fused/analysis/README.md",
    "internals/flows.md": "resnet_fused/flows/README.md",
    "internals/bench.md": "resnet_fused/tools/bench/README.md",
    "internals/cuda.md": "csrc/cuda/README.md",
    "internals/triton.md": "triton_kernels/README.md",
    "internals/benches.md": "benches/README.md",
    "internals/tests.md": "tests/README.md",
}
# a page of the reference: its modules, and of each the members that are shown; None: all that are public
REFERENCE: dict[str, dict[str, list[str] | None]] = {
    "reference/index.md": {
        "resnet_fused": [
            "fuse",
            "unfuse",
            "explain",
            "verify",
            "backends",
            "tune",
            "register_block",
            "BlockModules",
            "StageModules",
            "CompositeModules",
            "SplitModules",
            "DenseModules",
            "export_fused",
            "NotFusable",
            "BackendError",
        ],
        "resnet_fused.tools.explain": ["Explanation", "Row"],
        "resnet_fused.tools.verification": ["Report", "Bounds"],
    },
    "reference/functional.md": {
        "resnet_fused.functional": [
            "residual_block",
            "conv_bn_act",
            "batch_norm_act",
            "max_pool2d",
            "residual_block_max_pool2d",
        ]
    },
    "reference/params.md": {"resnet_fused.params": ["BlockParams", "StageParams"]},
    "reference/spec.md": {
        "resnet_fused.spec.block": ["BlockSpec", "StageSpec"],
        "resnet_fused.spec.activations": ["Activation", "Kind"],
    },
    "reference/models.md": {"resnet_fused.models": None},
    "reference/scaling.md": {"resnet_fused.scaling": None},
    "reference/spectral.md": {"resnet_fused.spectral": ["Lipschitz", "lipschitz", "conv_norm"]},
    "reference/testing.md": {"resnet_fused.testing": None},
    "reference/analysis.md": {
        "resnet_fused.analysis": None,
        "resnet_fused.analysis.gradients": None,
        "resnet_fused.analysis.jacobian": None,
        "resnet_fused.analysis.kinks": None,
        "resnet_fused.analysis.degree": None,
        "resnet_fused.analysis.receptive_field": None,
        "resnet_fused.analysis.geometry": None,
        "resnet_fused.analysis.blocks": None,
        "resnet_fused.analysis.chains": None,
    },
    "reference/flows.md": {"resnet_fused.flows": None},
    "reference/physics.md": {"resnet_fused.physics": None},
}
PICTURE = re.compile(r"!\[([^\]]*)\]\(\.\./(\S+)\)")
LINK = re.compile(r"(?<=\]\()(?!\w+://)([^)\s]+)(?=\))")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)


def main(target: Path) -> int:
    """Writes the tree; returns 1 where a text links to what no page shows."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("*.py", "requirements.txt"))
    shown = {f"docs/{file.relative_to(target)}": str(file.relative_to(target)) for file in target.rglob("*.*")}
    shown |= {source: page for page, source in FILES.items()} | {"README.md": "index.md"}
    shown[f"README.md#{_slug(THEORY)}"] = "theory.md"
    shown |= {f"README.md#{_slug(title)}": page for page, title in SECTIONS.items()}
    sections = dict(_sections((ROOT / "README.md").read_text()))
    pages = {page: ("README.md", sections.get(title, "")) for page, title in SECTIONS.items()}
    pages |= {page: (source, _shown(ROOT / source)) for page, source in FILES.items()}
    lost = [f"README.md: {title!r} is a section, or a page, and not both" for title in sections.keys() ^ _TITLES]
    for page, (source, text) in pages.items():
        _write(target / page, _turn_links(text, source, page, shown, lost))
    for page, modules in REFERENCE.items():
        _write(target / page, "\n".join(_module(name, members) for name, members in modules.items()))
    _write(target / "gallery.md", _gallery(ROOT / "docs"))
    print("\n".join(lost), end="\n" if lost else "", file=sys.stderr)
    return 1 if lost else 0


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _module(name: str, members: list[str] | None) -> str:
    """What makes mkdocstrings write a module's reference."""
    return f"::: {name}\n" + (f"    options: {{members: {json.dumps(members)}}}\n" if members is not None else "")


def _gallery(docs: Path) -> str:
    """Every topic of theory.md with the first picture of its page."""
    parts = ["# The theory in pictures", '<div class="gallery" markdown>']
    for title, path in re.findall(r"^\| \[([^\]]+)\]\((\S+)\)", (docs / "theory.md").read_text(), re.M):
        picture = PICTURE.search((docs / path).read_text())
        if picture is not None:
            parts.append(f"[![{picture[1]}]({picture[2]}) {title}]({path})")
    return "\n\n".join([*parts, "</div>"]) + "\n"


def _sections(readme: str) -> Iterator[tuple[str, str]]:
    """Each section of README by its title, as a page: its headings are raised by one."""
    head, *rest = re.split(r"^## ", readme, flags=re.M)
    yield "", head
    for section in rest:
        yield section.partition("\n")[0], "# " + re.sub(r"^###", "##", section, flags=re.M)


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _turn_links(text: str, source: str, page: str, shown: dict[str, str], lost: list[str]) -> str:
    """`text` of the file `source`, with links from where it is shown to where their targets are."""

    def turned(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
        with_anchor = f"{target}#{anchor}"
        if with_anchor in shown:
            return os.path.relpath(shown[with_anchor], posixpath.dirname(page) or ".")
        if target not in shown or (anchor and target == "README.md"):  # whose sections are pages
            lost.append(f"{source} links to {match[1]}, which no page shows: name it in docs/site/pages.py")
            return match[1]
        return os.path.relpath(shown[target], posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")

    parts = CODE.split(text)  # odd ones are code
    return "".join(part if i % 2 else LINK.sub(turned, part) for i, part in enumerate(parts))


def _shown(file: Path) -> str:
    text = file.read_text()
    return {".py": _script, ".ipynb": _notebook}.get(file.suffix, str)(text)


def _script(source: str) -> str:
    """A page that shows a script under the first line of its docstring."""
    title = source.partition("\n")[0].strip('"').rstrip(".")
    return f"# {title}\n\n```python\n{source.rstrip()}\n```\n"


def _notebook(source: str) -> str:
    """A page from a notebook: text as it is, code, and below it what it printed and drew."""
    return "\n\n".join(part for cell in json.loads(source)["cells"] for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield text
        return
    yield f"```python\n{text}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            png = base64.b64encode(base64.b64decode(data["image/png"])).decode()  # without line breaks
            yield f'<img alt="What the cell draws" src="data:image/png;base64,{png}">'
        elif printed := "".join(output.get("text", data.get("text/plain", []))).rstrip():
            yield f"```text\n{printed}\n```"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
