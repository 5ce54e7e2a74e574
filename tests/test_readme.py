"""The commands of the README, read as the command line reads them: names and values that it does not know are found."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from transect.cli import main_group

FOLDER = Path(__file__).parent.parent
SHORT = ("...", "…")  # where a command leaves out what was said before


def commands(text: str) -> list[str]:
    """Every command line in code, whole: between single backquotes or on a line of a block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    written = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    found = (re.match(r"(?:\$ )?(?:\w+=\S+ )*(transect [a-z].*)", " ".join(code.split())) for code in inline + written)
    return list(dict.fromkeys(match[1] for match in found if match))


COMMANDS = [
    command for name in ("README.md", "benchmarks/README.md") for command in commands((FOLDER / name).read_text())
]


def test_there_are_commands_to_read():
    assert len(COMMANDS) > 50 and "transect compare smollm2" in " ".join(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_one_that_the_command_line_takes(command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in SHORT]
    try:
        group = click.Context(main_group)
        found = main_group.get_command(group, words[0])
        assert found is not None, f"there is no command {words[0]}"
        found.make_context(words[0], words[1:], parent=group)
    except click.exceptions.Exit:
        pass  # --help and --version
    except click.exceptions.MissingParameter:
        # A command that is only named, or that leaves out what was said before.
        assert len(words) < 4 or any(word in command for word in SHORT)
