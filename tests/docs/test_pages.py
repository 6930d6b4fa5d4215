"""What the site is built from: every link leads to a page, every public name stands in the reference."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import resnet_fused

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load("pages")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "docs"
    assert pages.main(target) == 0
    return target


def test_links_of_moved_texts_lead_to_pages(tree: Path) -> None:
    moved = [*pages.SECTIONS, *pages.FILES, "gallery.md"]
    links = [(page, link) for page in moved for link in re.findall(r"\]\(([^)\s]+)\)", (tree / page).read_text())]
    assert len(links) > 20
    for page, link in links:
        path = link.partition("#")[0]
        assert link.startswith("https://") or (tree / page).parent.joinpath(path).resolve().is_file(), (page, link)


def test_a_link_to_what_no_page_shows_is_told() -> None:
    lost: list[str] = []
    text = pages._turn_links("[a](setup.py) `[b](c)` [d](#nowhere) [e](https://e.org)", "README.md", "x.md", {}, lost)
    assert text == "[a](setup.py) `[b](c)` [d](#nowhere) [e](https://e.org)"
    assert [line.split(",")[0] for line in lost] == ["README.md links to setup.py", "README.md links to #nowhere"]


def test_every_page_is_in_the_navigation(tree: Path) -> None:
    listed = set(re.findall(r"(?:^|\s)(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(page.relative_to(tree)) for page in tree.rglob("*.md")}


def test_the_reference_has_every_public_name() -> None:
    shown = {name: members for modules in pages.REFERENCE.values() for name, members in modules.items()}
    for name, members in shown.items():
        module = importlib.import_module(name)
        assert all(hasattr(module, member) for member in members or ()), name
    documented = {member for members in shown.values() for member in members or ()}
    public = {name for name in resnet_fused.__all__ if not inspect.ismodule(getattr(resnet_fused, name))}
    assert public - documented == set()


def test_the_gallery_shows_every_topic_that_has_a_picture(tree: Path) -> None:
    topics = re.findall(r"\]\((theory/\S+)\)", (ROOT / "docs" / "theory.md").read_text())
    shown = re.findall(r"\]\((theory/\S+)\)", (tree / "gallery.md").read_text())
    assert shown == [topic for topic in topics if "](../pictures/" in (ROOT / "docs" / topic).read_text()]
