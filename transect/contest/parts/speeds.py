"""How fast a model reads and writes at some length, what memory that takes, and from where on it is the faster one."""

from __future__ import annotations

import inspect
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ...errors import TransectError
from ...evaluation import parameters
from ...forward import at_rest

NEW = 16  # tokens that are written behind a prompt
PROBED = 2048  # positions, above which a quarter is tried first
BUDGET = 1.0  # seconds for the passes that are timed, about, and for the tokens
MOST_SECONDS, MOST_MEMORY = 120.0, 0.5  # of one pass, and of what is free: what promises to take more is left out


def speed_at(make: Callable[[int], Any], length: int, device: str) -> dict[str, Any]:
    """prefill: seconds for a prompt that fills `length` but for 16 positions. decode: seconds for a token behind it.
    memory: bytes of all tensors that were there at once in the prefill, weights apart. state: bytes that are kept for
    the next token.

    make: a model for sequences of that length. One sequence at a time. A `note` stands instead where a pass would take
    more than two minutes or half of the free memory, by what a quarter of the length takes, or fails.
    """
    try:
        with torch.device("meta"):
            numbers = parameters(make(length))
        if 4 * numbers > MOST_MEMORY * psutil.virtual_memory().available:
            return {"note": f"at {length} positions it has {numbers:,} parameters, too many for the free memory"}
        if length > PROBED:
            quarter = length // 4
            memory, _, seconds = _pass(make(quarter).to(device), quarter)
            if 16 * seconds > MOST_SECONDS or 16 * memory > MOST_MEMORY * psutil.virtual_memory().available:
                return {
                    "note": f"left out at {length} positions: at {quarter} a pass takes {seconds:.1f} s and "
                    f"{memory / 1e6:.0f} MB"
                }
        model = make(length).to(device)
        memory, state, _ = _pass(model, length)  # which also warms up
        prefill, decode = _timed(model, length)
    except (TransectError, RuntimeError) as reason:
        return {"note": f"at {length} positions: {str(reason).partition(chr(10))[0][:300]}"}
    return {"prefill": prefill, "decode": decode, "memory": memory, "state": state}


@torch.no_grad()
def _timed(model: Any, length: int) -> tuple[float, float]:
    """Median seconds for a prompt, of up to five, and for a token behind it, of up to 16."""
    ids, few = _prompt(model, length)
    reading: list[float] = []
    writing: list[float] = []
    with at_rest(model):
        output = _clocked(reading, model, input_ids=ids, **few)
        while len(reading) < 5 and sum(reading) < BUDGET:
            output = _clocked(reading, model, input_ids=ids, **few)
        while len(writing) < NEW and sum(writing) < BUDGET:
            token = output.logits[:, -1:].argmax(-1)
            output = _clocked(writing, model, input_ids=token, past_key_values=output.past_key_values)
    return statistics.median(reading), statistics.median(writing)


def _clocked(taken: list[float], model: Any, **given: Any) -> Any:
    """What the model puts out, with its cache; the seconds that it took are added to the list."""
    started = time.perf_counter()
    output = model(use_cache=True, **given)
    float(output.logits.sum())  # waits for a GPU
    taken.append(time.perf_counter() - started)
    return output


@torch.no_grad()
def _pass(model: Any, length: int) -> tuple[int, int, float]:
    """A prompt through the model, with its cache: bytes at once, bytes kept, seconds."""
    ids, few = _prompt(model, length)
    started = time.perf_counter()
    with at_rest(model), Tensors(model) as tensors:
        output = model(input_ids=ids, use_cache=True, **few)
    float(output.logits.sum())  # waits for a GPU
    return tensors.most, _kept(output.past_key_values), time.perf_counter() - started


def _prompt(model: Any, length: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Random ids (1 x length - 16), and what keeps the model from putting out logits that nobody needs."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, length - NEW), generator=torch.Generator().manual_seed(0)).to(model.device)
    return ids, {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _kept(cache: Any) -> int:
    """Bytes in a cache: keys and values, or the state of mixers."""
    found = [
        tensor for layer in cache.layers for tensor in tree_leaves(vars(layer)) if isinstance(tensor, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


class Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, as they come and go; the model's own are not counted.

    What a kernel takes for itself while it runs is not seen. most: the bytes that were there at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known[storage] = True
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._gone, size)
        self.most = max(self.most, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def crossover(lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The length from which on ours takes less time; infinite if that is not so at the longest, the shortest if always.

    Between two measured lengths the logarithm of the ratio is taken for linear in that of the length.
    """
    ratios = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    first = len(ratios)
    while first and ratios[first - 1] < 0:
        first -= 1
    if first == len(ratios):
        return math.inf
    if first == 0:
        return float(lengths[0])
    before, after = ratios[first - 1], ratios[first]
    share = before / (before - after)
    return lengths[first - 1] * (lengths[first] / lengths[first - 1]) ** share
