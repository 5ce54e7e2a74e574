"""Importing every module of a package, so that a new file registers what it defines without being listed anywhere;
acting when somebody else's module is imported; and importing much in less time."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any


@contextmanager
def importing() -> Iterator[None]:
    """Inside, no garbage is looked for: in what is imported, which stays, that takes a sixth of the time.

    Behind it, what was imported counts as old: as young, the first search would go through all of it for nothing.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():  # the caller's own frozen objects stay frozen
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()


def import_all(package: str, path: Iterable[str]) -> None:
    """Import the modules right below a package; call it with the package's own `__name__` and `__path__`."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda found: found.name):
        importlib.import_module(f"{package}.{module.name}")


def when_imported(name: str, act: Callable[[Any], None]) -> None:
    """Call `act` with the module of that name: now, or as soon as it is imported, which may be never."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(one, _WhenImported) and one.waits_for(name, act) for one in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(name, act))


class _WhenImported(MetaPathFinder):
    """Importing some packages takes seconds, and most never need them."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self.name, self.act = name, act

    def waits_for(self, name: str, act: Callable[[Any], None]) -> bool:
        return (self.name, self.act) == (name, act)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """That of the module itself, which tells once it has been executed; None for all others."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.act(module)

            spec.loader.exec_module = exec_module
        return spec
