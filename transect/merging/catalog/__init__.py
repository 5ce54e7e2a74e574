"""The ways to merge: every module and folder in here."""

import importlib
import pkgutil


def load() -> None:
    """Import all of them, which registers them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
