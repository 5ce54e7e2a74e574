"""Finished models beside those that a comparison makes: whether the same texts judge them, and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..anatomy import Anatomy
from ..checkpoint import Opened, folder_of, open_model
from ..compression.fingerprint import computation_fingerprint
from ..errors import TransectError
from ..evaluation import check_lengths
from ..forward import task_of
from .plan import Finished

_VERBS = ("convert", "compress", "search", "recover", "adapt", "memorize", "edit")  # of steps in a record's history


def opened_beside(source: str, dtype: str, device: str) -> Opened:
    """The model, with its numbers in the type of the dense one, so that bytes can be compared."""
    return open_model(source, dtype=dtype, device=device)


def beside_of(
    dense: Anatomy, tokenizer: Any, sources: Sequence[str], lengths: Sequence[int] = ()
) -> dict[str, Finished]:
    """The finished models by the shortest names that tell them apart, in their order; their weights are read.

    tokenizer: of the dense model, None where it has none. TransectError, before any is read, where one is not there;
    and for one of another task or vocabulary, or that does not go on with prompts of these lengths.
    """
    for source in sources:
        folder_of(source)
    names = [Path(source).name for source in sources]
    if len(set(sources)) < len(sources):
        raise TransectError("a finished model is named twice in beside")
    names = names if len(set(names)) == len(names) else list(sources)
    found = {}
    for name, source in zip(names, sources, strict=True):
        opened = opened_beside(source, str(dense.model.dtype).removeprefix("torch."), str(dense.model.device))
        _check_alike(source, opened, dense, tokenizer)
        if lengths:
            check_lengths(opened.model, lengths, source)
        history = Anatomy(opened.model).record.history
        found[name] = Finished(str(opened.path or source), _done(history), computation_fingerprint(opened.model))
    return found


def _check_alike(source: str, opened: Opened, dense: Anatomy, tokenizer: Any) -> None:
    """TransectError unless the model predicts the same things from the same inputs."""
    tasks = task_of(opened.model), task_of(dense.model)
    if tasks[0] != tasks[1]:
        raise TransectError(f"{source} is for another task ({tasks[0]}) than the model that is compared ({tasks[1]})")
    for name, words in (("vocab_size", "words in its vocabulary"), ("num_labels", "classes")):
        if name == "num_labels" and tasks[0] != "classification":
            continue
        sizes = [getattr(one.config.get_text_config(), name, None) for one in (opened.model, dense.model)]
        if sizes[0] != sizes[1]:
            raise TransectError(
                f"{source} has {sizes[0]} {words}, and the model that is compared {sizes[1]}: their losses are not of "
                "the same predictions"
            )
    both = [one for one in (tokenizer, opened.tokenizer) if hasattr(one, "get_vocab")]
    if len(both) == 2 and both[0].get_vocab() != both[1].get_vocab():
        raise TransectError(f"the tokenizer of {source} has other words than that of the model that is compared")


def _done(history: Sequence[dict[str, Any]]) -> str:
    """What was done to a model, such as `liger + recover`."""
    steps = []
    for step in history:
        for verb in _VERBS:
            if verb in step:
                named = step[verb].get("method") if isinstance(step[verb], dict) else step[verb]
                steps.append(str(named or verb))
    return " + ".join(steps)
