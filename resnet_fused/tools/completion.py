"""``resnet-fused completion SHELL``: a script with which the shell completes commands, options, files and models.

shtab writes it from the parser, once: completing then needs no Python, and so does not wait for torch to be imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from resnet_fused.tools.named_models import FAMILY

SHELLS = ("bash", "zsh")
ABOUT = """Print a script with which the shell completes commands, options, files and models. It is made once:

  bash: resnet-fused completion bash > ~/.local/share/bash-completion/completions/resnet-fused
  zsh:  resnet-fused completion zsh > DIR/_resnet-fused, where DIR is in $fpath, before compinit"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Raises ImportError that says what to install."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            f"completion needs shtab: `pip install resnet_fused[completion]` (import said: {error})"
        ) from error
    places = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
    for action in _actions(parser):
        if isinstance(action.metavar, str) and action.metavar in places:
            action.complete = places[action.metavar]  # type: ignore[attr-defined]
        elif action.dest == "model":
            action.complete = shtab.cmd(f"echo {' '.join(FAMILY)}")  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of the parser and of all its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
