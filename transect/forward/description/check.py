"""Whether a description of an architecture is true: what must hold of it, tried on a tiny random model.

A description is believed by everything else, and a wrong one gives wrong numbers without a word. So one that a user
brings is checked before its first use, and `transect check-architecture` shows every check with its number. A check is
a function of the bench that returns a relative error; it raises NotApplicable where it means nothing for the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...anatomy import Architecture, verify_with
from ...errors import NotApplicable, TransectError, WrongDescription
from . import changes, roles, stream  # noqa: F401 - importing them registers their checks
from .bench import CHECKS, Bench, Check
from .twin import class_and_config, small_config, twin

SMALL = 5_000_000  # parameters of a user's own model that is checked itself where no tiny one can be made
_under_check: list[Architecture] = []  # their models are opened by the checks themselves


def check_description(model: Any, architecture: Architecture) -> list[Check]:
    """Make every check on a small model (float64, better random than trained), which stays as it is."""
    _under_check.append(architecture)
    try:
        bench = Bench(model, architecture)
        return [_made(bench, what, keys, function) for what, keys, function in CHECKS]
    finally:
        _under_check.pop()


def _made(bench: Bench, what: str, keys: tuple[str, ...], function: Callable[[Bench], float]) -> Check:
    try:
        return Check(what, keys, function(bench))
    except NotApplicable as reason:
        return Check(what, keys, None, str(reason), applies=False)
    except Exception as error:  # a wrong path, a wrong shape, a module that does not run any more: each a wrong key
        return Check(what, keys, None, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def check_architecture(architecture: Architecture, model: Any = None) -> list[Check]:
    """Check a description on a tiny random model: of the model's class and config, or of its first model type's.

    Where none can be made from the model's config, a small model is checked itself; TransectError for a large one.
    """
    if model is None:
        subject = twin(*class_and_config(architecture.model_types[0]), architecture)
    else:
        subject = _subject(model, architecture)
    if subject is None:
        raise TransectError(f"no tiny {type(model).__name__} can be made from its config, and this one is not small")
    return check_description(subject, architecture)


_verified: list[tuple[Architecture, type, str]] = []


@torch.random.fork_rng(devices=[])
def verify(model: Any, architecture: Architecture) -> None:
    """Raise WrongDescription unless the description is true of models like this one; done once for each kind.

    On a tiny random model of the same class and config; where there is none to be had, on a copy of the model itself
    if it is small. A warning says so where neither is possible.
    """
    if any(architecture is one for one in _under_check):
        return
    try:
        config = small_config(model.config, architecture).to_json_string()
    except Exception:  # each config has its own way to refuse
        config = ""
    kind = (architecture, type(model), config)
    if kind in _verified:
        return
    subject = _subject(model, architecture)
    if subject is None:
        warnings.warn(
            f"the architecture description {architecture.name!r} could not be checked: no tiny "
            f"{type(model).__name__} can be made from its config",
            stacklevel=4,
        )
    else:
        failed = [made for made in check_description(subject, architecture) if not made.passed]
        if failed:
            raise WrongDescription(
                f"the architecture description {architecture.name!r} does not fit {type(model).__name__}: "
                f"{failed[0].complaint}; {len(failed) - 1} more of its checks fail. `transect check-architecture` "
                "shows them all"
            )
    _verified.append(kind)


def _subject(model: Any, architecture: Architecture) -> Any:
    try:
        made = twin(type(model), model.config, architecture)
        Bench(made, architecture)
        return made
    except Exception:  # a class that cannot be made from its config alone, a size that it refuses
        parameters = list(model.parameters())
        if sum(parameter.numel() for parameter in parameters) > SMALL or any(p.is_meta for p in parameters):
            return None
        return copy.deepcopy(model).eval().double()


verify_with(verify)
