"""A model's head on some positions at a time, so that the logits of a large vocabulary are never in memory at once.

The head is not written anew: the model's own forward runs, in which the body (everything below the head) is a stand-in
that puts out the hidden states that are wanted. So softcaps, scales and transforms are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from .objective import IGNORED, Batch, inputs_of, labels_at, outputs_of, targets_of, task_of, to_device

NUMBERS = 1 << 22  # logits at once: 16 MB in float32


def scored(model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (n x classes) and labels (n) as `predictions` gives them, and of which example of the batch they are (n).

    A part at a time; none if nothing is predicted. The body runs once. What is made of one part can be dropped before
    the next.
    """
    targets = targets_of(model, to_device(batch, model.device))
    counted = targets != IGNORED
    labels, examples, start = labels_at(model, batch, targets), counted.nonzero()[:, 0], 0
    for logits in logits_at(model, batch, counted):
        part = slice(start, start := start + len(logits))
        yield logits, labels[part], examples[part]


def logits_at(model: Any, batch: Batch, where: Tensor) -> Iterator[Tensor]:
    """Logits (n x V) of the positions at which `where` (B x T) is true, in their order, a part at a time.

    where: for a classifier, which examples (B).
    """
    body = _Body(model, batch)
    for rows in body.states(where).split(body.rows):
        if len(rows):
            yield body.logits(rows)


def last_logits(model: Any, ids: Tensor, count: int = 1) -> Tensor:
    """Logits (B x count x V) of the last positions of token ids (B x T), none of them padding.

    The head runs on these alone where the model's forward knows how (`logits_to_keep`).
    """
    return model(input_ids=ids, use_cache=False, **keeping(model, count)).logits[:, -count:]


def keeping(model: Any, count: int) -> dict[str, int]:
    """What tells the model's forward to put out the logits of the last `count` positions; nothing if it cannot."""
    return {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}


def backpropagate(model: Any, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What `loss(*predictions(model, batch)).backward()` does, with the logits of a part of the positions at a time.

    loss: of logits (n x classes) and labels (n; see `targets_of`, also where hidden states are asked for), a sum over
    the n predictions. Each part's gradient goes as far as the last hidden states, and from there on all of them go at
    once.
    """
    targets = targets_of(model, to_device(batch, model.device))
    counted = targets != IGNORED
    body = _Body(model, batch)
    states, labels = body.states(counted), targets[counted]
    gradient = states.detach().clone()
    for part, own in zip(gradient.split(body.rows), labels.split(body.rows), strict=True):
        if len(part):
            rows = part.clone().requires_grad_()
            loss(body.logits(rows), own).backward()
            assert rows.grad is not None
            part.copy_(rows.grad)
    states.backward(gradient)


class _Body:
    """One pass through a model's body, and then its head on any of the positions.

    The body is what the model's forward calls first of what puts out `last_hidden_state`: the base model, or one of its
    parts (OPT's decoder). Where there is none or more than one, or the head wants all positions at once (a
    classifier's), the hidden states are the logits themselves and the head does nothing: the result is right and takes
    the memory of all logits.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.inputs = model, inputs_of(model, batch)
        self.found: nn.Module | None = None
        self.output: Any = None
        self.given: Tensor | None = None
        self.inside = self.several = False
        whole = task_of(model) in ("classification", "embedding")
        logits = None if whole else self._run()  # of one position
        if logits is None or (self.found is not None and (self.several or logits.shape[:-1] != (1, 1))):
            self.found, logits = None, outputs_of(model, self.inputs)
        self.hidden: Tensor = logits if self.found is None else self.output.last_hidden_state
        self.rows = max(1, NUMBERS // logits.shape[-1])

    def states(self, where: Tensor) -> Tensor:
        """The last hidden states (n x d) of the positions at which `where` is true."""
        states = self.hidden.reshape(-1, self.hidden.shape[-1])
        return states.index_select(0, where.to(states.device).flatten().nonzero()[:, 0])

    def logits(self, rows: Tensor) -> Tensor:
        """What the head makes of hidden states (n x d): n x V."""
        if self.found is None:
            return rows
        self.given = rows[None]
        return self._run()[0]

    def _run(self) -> Tensor:
        with self._standing_in():
            return self.model(**self.inputs).logits

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        base = self.model.base_model
        modules = [] if base is self.model else [base, *base.children()]
        before = [module.__dict__.get("forward") for module in modules]  # accelerate puts its own there
        try:
            for module in modules:
                module.forward = partial(self._forward, module, module.forward)
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.found is None and not self.inside:
            self.inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self.inside = False
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                return output
            self.found, self.output, self.given = module, output, hidden[:1, :1]
        elif module is not self.found:
            output = forward(*args, **kwargs)
            self.several |= not self.inside and hasattr(output, "last_hidden_state")
            return output
        return type(self.output)(**{**self.output, "last_hidden_state": self.given})
