"""The self-contained modeling file of a checkpoint: with it, the folder loads where Transect is not installed.

It is put together from the package's own sources: starting at what is needed, definition by definition, following
names through the package's imports. So there is one source of truth, and the file is the same every time.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import resolve_name
from typing import Any

from transformers.models.auto import auto_factory, modeling_auto

from ..anatomy.record import StructureRecord
from ..errors import TransectError
from ..operators import described_kinds

MODULE = "modeling_transect"
_HEAD = '''"""Written by Transect: loads this checkpoint with trust_remote_code=True where Transect is not installed."""

from __future__ import annotations
'''
_CLASS = '''
class {name}(transformers.{name}):
    """{name} with the structure that config.json records."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        register_for_lack_of_transect()
        return super().from_pretrained(*args, **kwargs)
'''


def concrete_class(model: Any) -> type:
    """The transformers class of a model, also where a checkpoint's modeling file has derived one from it."""
    return next((c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")), type(model))


@cache
def auto_map(cls: type) -> Mapping[str, str]:
    """The `auto_map` of config.json: every auto class that gives `cls` -> the class in the modeling file."""
    found = {}
    for auto in vars(modeling_auto).values():
        if isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass):
            mapping: Any = auto._model_mapping  # its truth value would import every model of transformers
            models = () if mapping is None else mapping.get(getattr(cls, "config_class", None), ())
            if cls in (models if isinstance(models, (tuple, list)) else (models,)):
                found[auto.__name__] = f"{MODULE}.{cls.__name__}"
    return dict(sorted(found.items()))


def loader_of(model: Any) -> str:
    """The name of the auto class that loads the model's checkpoint, or of its own class where none does."""
    cls = concrete_class(model)
    return next(iter(auto_map(cls)), cls.__name__)


def modeling_source(cls: type, record: StructureRecord) -> str:
    """The text of the file, for a model of class `cls` with this record.

    Raises TransectError where an operator's source cannot be had, or two needed definitions have one name.
    """
    known = described_kinds()
    kinds = sorted({kind for entry in record.modules.values() for kind in _kinds(entry)} & set(known))
    needed = tuple((known[kind].__module__, known[kind].__name__) for kind in kinds)
    return _definitions(needed) + _CLASS.format(name=cls.__name__).lstrip()


@cache
def _definitions(needed: tuple[tuple[str, str], ...]) -> str:
    """The file but for the model's class. needed: module and name of each class that the record asks for."""
    collected = _Collection()
    collected.add("transect.checkpoint.quantizer", "register_for_lack_of_transect")
    for module, name in needed:
        collected.add(module, name)
    imports = sorted({*collected.imports, "import transformers"})
    return "\n".join([_HEAD, *imports]) + "\n\n\n" + "\n\n\n".join([*collected.definitions.values(), ""])


def _kinds(description: Any) -> Iterator[str]:
    """Every `kind` in a description, also of the parts within parts."""
    if isinstance(description, dict):
        if isinstance(description.get("kind"), str):
            yield description["kind"]
        description = list(description.values())
    if isinstance(description, list):
        for part in description:
            yield from _kinds(part)


class _Collection:
    """Definitions and imports, each after what it needs."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.definitions: dict[str, str] = {}
        self.origin: dict[str, str] = {}

    def add(self, module: str, name: str) -> None:
        """Add what `name` means in `module`, and what that needs; nothing for a builtin or a local name."""
        lines, bound = _module(module)
        if name not in bound:
            return
        node, alias = bound[name]
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("transect")):
            assert alias is not None
            if alias.asname not in (None, alias.name):
                raise TransectError(f"{module} imports {alias.name} under another name, which cannot be copied")
            self.add(resolve_name("." * node.level + (node.module or ""), _package(module)), name)
            return
        if alias is not None:
            single = (
                ast.ImportFrom(node.module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
            )
            self.imports.add(ast.unparse(single))
            return
        if self.origin.setdefault(name, module) != module:
            raise TransectError(f"{name!r} is defined in {module} and in {self.origin[name]}; rename one of them")
        if name in self.definitions:
            return
        self.definitions[name] = ""  # taken; a definition may need itself
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id != name:
                self.add(module, inner.id)
        del self.definitions[name]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        self.definitions[name] = "\n".join(lines[first - 1 : node.end_lineno])


def _package(module: str) -> str:
    return module if hasattr(sys.modules[module], "__path__") else module.rpartition(".")[0]


@cache
def _module(name: str) -> tuple[list[str], dict[str, tuple[ast.stmt, ast.alias | None]]]:
    """A module's lines, and what each name at its top level is bound by."""
    module = sys.modules.get(name)
    try:
        with open(str(getattr(module, "__file__", None)), encoding="utf-8") as file:
            source = file.read()
    except (AttributeError, OSError) as error:
        raise TransectError(f"the source of {name} cannot be read, so it cannot be put in a checkpoint") from error
    bound: dict[str, tuple[ast.stmt, ast.alias | None]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound[node.name] = node, None
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        bound[part.id] = node, None
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = node, alias
    return source.splitlines(), bound
