"""Importing every module of a package, so that a new file registers what it defines without being listed anywhere."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable


def import_all(package: str, path: Iterable[str]) -> None:
    """Import the modules right below a package; call it with the package's own `__name__` and `__path__`."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda found: found.name):
        importlib.import_module(f"{package}.{module.name}")
