"""Docstrings of this package as Markdown: they are written to be read as plain text.

A paragraph that begins with ``name: what it is`` becomes a list of definitions, if `name` is a parameter or a field: an
entry for each such line, continued by lines that are further in, and for each such sentence. ``x, y`` and ``x/y`` name
several. "Returns" and "Raises" are set in bold. A named tuple's fields, of which no signature is shown, are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ENTRY = re.compile(r"^(\w+(?:(?:, |/)\w+)*):\s+(\S.*)$")


class PlainText(griffe.Extension):
    """Rewrites each docstring when its object is complete."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """The fields, and what `__init__` takes."""
        names = set(cls.members)
        init = cls.members.get("__init__")
        if isinstance(init, griffe.Function):
            names |= {parameter.name for parameter in init.parameters}
        _rewrite(cls, names)
        if cls.docstring is not None:
            cls.docstring.value = _fields(cls) + cls.docstring.value

    def on_module_instance(self, *, mod: griffe.Module, **_: Any) -> None:
        _rewrite(mod, set())

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        _rewrite(attr, set())


def _rewrite(described: griffe.Object, names: set[str]) -> None:
    if described.docstring is not None:
        described.docstring.value = markdown(described.docstring.value, names)


def _fields(cls: griffe.Class) -> str:
    """Of a named tuple, as a call of it; "" for other classes."""
    if not any(str(base) == "NamedTuple" for base in cls.bases):
        return ""
    fields = [member for member in cls.members.values() if isinstance(member, griffe.Attribute) and member.annotation]
    lines = [f"    {field.name}: {field.annotation}" + (f" = {field.value}" if field.value else "") for field in fields]
    return "\n".join(["```python", f"{cls.name}(", *(f"{line}," for line in lines), ")", "```", "", ""])


def markdown(text: str, names: set[str]) -> str:
    """The docstring as Markdown, where `names` are parameters or fields."""
    text = re.sub(r"::$", ":", text, flags=re.M)
    text = re.sub(r"^(Returns|Raises)\b", r"\n**\1**", text, flags=re.M)
    return "\n\n".join(_paragraph(part.splitlines(), names) for part in re.split(r"\n\s*\n", text.strip("\n")))


def _paragraph(lines: list[str], names: set[str]) -> str:
    entries = _entries(lines, names)
    if not entries:
        return "\n".join(lines)
    return "\n\n".join(f"{named}\n:   {about}" for text in entries for named, about in _sentences(text, names))


def _entries(lines: list[str], names: set[str]) -> list[str]:
    """The text of each entry; none where the paragraph is something else."""
    found: list[list[str]] = []
    for line in lines:
        if _begins(line, names):
            found.append([line])
        elif found and (line.startswith(" ") or len(found) == 1):
            found[-1].append(line.strip())
        else:
            return []
    return [" ".join(entry) for entry in found]


def _begins(line: str, names: set[str]) -> bool:
    entry = ENTRY.match(line)
    return entry is not None and set(re.split(", |/", entry[1])) <= names


def _sentences(text: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """(names, what they are) for an entry, and for each further one that begins with a sentence of it."""
    parts = [text]
    for sentence in re.split(r"(?<=[.;]) ", text)[1:]:
        if _begins(sentence, names):
            head, _, _ = parts[-1].partition(sentence)
            tail = parts[-1][len(head) :]
            parts[-1:] = [head.rstrip(" ;"), tail]
    for part in parts:
        named, about = part.split(":", 1)
        yield ", ".join(f"`{name}`" for name in re.split(", |/", named)), about.strip()
