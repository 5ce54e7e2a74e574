"""Every text file is opened as UTF-8, whatever the machine's language: a rule over the source."""

from __future__ import annotations

import ast
from pathlib import Path

import transect

PACKAGE = Path(transect.__file__).parent
METHODS = {"open", "read_text", "write_text", "to_csv", "fdopen"}  # `write_text` alone is the one of our store


def without_encoding(source: str) -> list[int]:
    """Lines on which a text file is opened without saying in which encoding."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or "encoding" in {keyword.arg for keyword in call.keywords}:
            continue
        binary = [one.value for one in call.args if isinstance(one, ast.Constant) and "b" in str(one.value)]
        if isinstance(call.func, ast.Name):
            opens = call.func.id == "open" and not binary
        else:
            of, name = ast.unparse(call.func).rpartition(".")[::2]
            opens = name in METHODS and of not in ("os", "Image") and not (binary and name in ("open", "fdopen"))
            opens = opens and (name != "to_csv" or bool(call.args))  # else it gives the text
        if opens:
            found.append(call.lineno)
    return sorted(found)


def test_text_files_say_their_encoding():
    found = {str(file): without_encoding(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}
    assert len(found) > 500 and not {file: lines for file, lines in found.items() if lines}


def test_the_rule_sees_them():
    assert without_encoding("open(a)\nopen(a, 'w')\np.read_text()\np.write_text(b)\nt.to_csv(p)") == [1, 2, 3, 4, 5]
    assert not without_encoding("open(a, 'rb')\nos.open(a)\np.open('rb')\np.read_text(encoding='utf-8')")
