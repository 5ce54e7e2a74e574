"""Sizes with which models of different parts have the same number of parameters, or of operations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import OutOfReach, TransectError
from ...evaluation import parameters
from ...parts import Mixer, Part, build_model

Equal = Literal["parameters", "flops"]
WITHIN = 0.01


def built(
    base: str,
    parts: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int | None],
    vectors: int = 0,
    seed: int = 0,
) -> Any:
    """The model with random weights of that seed; with `vectors`, one that reads vectors of that width.

    These are given as `inputs_embeds`, which the model takes in its own width: a linear map with a bias, `read_in`,
    leads there.
    """
    given: dict[str, Any] = {**sizes}
    model = build_model(base, parts=parts, settings=settings, seed=seed, **given)
    if not vectors:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.read_in = read_in = nn.Linear(vectors, model.get_input_embeddings().embedding_dim)

    def read(body: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("inputs_embeds")
        return args, kwargs if given is None else {**kwargs, "inputs_embeds": read_in(given)}

    model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    return model


def fitted(
    base: str,
    parts: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int | None],
    equal: Equal,
    wanted: int,
    length: int,
    vectors: int = 0,
) -> dict[str, int | None]:
    """The sizes with a number of neurons, and where that does not do a width, that make the count what is wanted.

    equal: which count: parameters, or floating point operations for a sequence of `length`. vectors: see `built`.
    The neurons of the MLP are changed first; if the count is out of their reach, or nothing in the model depends on
    them, the stream's width, in steps of the heads and even for each; both in steps that the parts can take. Raises
    OutOfReach if no width comes within 1 %.
    """
    return {**sizes, **_fit(json.dumps([base, parts, settings, sizes, equal, wanted, length, vectors]))}


@lru_cache(maxsize=256)
def _fit(described: str) -> dict[str, int]:
    """What `fitted` changes, by its arguments in JSON: every trial of an entrant asks for the same."""
    base, parts, settings, sizes, equal, wanted, length, vectors = json.loads(described)

    @cache
    def count(name: str, size: int) -> int:
        with torch.device("meta"):
            model = built(base, parts, settings, {**sizes, name: size}, vectors)
        return parameters(model) if equal == "parameters" else flops_of_model(model, length)

    hidden, heads = sizes.get("hidden") or 0, sizes.get("heads") or 1
    found: list[tuple[float, dict[str, int]]] = []
    each = _grain(lambda size: count("neurons", size), 1)
    if count("neurons", 2 * each) != count("neurons", 4 * each):
        steps = _nearest(lambda size: count("neurons", size * each), wanted, 1, 64 * hidden // each)
        found.append((abs(count("neurons", steps * each) / wanted - 1), {"neurons": steps * each}))
    if not found or found[0][0] > WITHIN:
        step = _grain(lambda size: count("hidden", size), 2 * heads)
        steps = _nearest(lambda size: count("hidden", size * step), wanted, 1, 64 * hidden // step)
        found.append((abs(count("hidden", steps * step) / wanted - 1), {"hidden": steps * step}))
    off, changed = min(found, key=lambda one: one[0])
    if off > WITHIN:
        raise OutOfReach(
            f"no width gives {wanted:,} {equal} within 1 %: the nearest, {changed}, is {100 * off:.1f} % off; choose "
            "another number, or another --hidden"
        )
    return changed


def _grain(count: Callable[[int], int], least: int) -> int:
    """The smallest of least, 2 least ... 64 least that sizes may go in steps of: a part's groups divide them."""
    for grain in (least << doublings for doublings in range(6)):
        try:
            for size in (grain, 3 * grain):
                count(size)
            return grain
        except TransectError:
            continue
    return least << 6


def _nearest(count: Callable[[int], int], wanted: int, low: int, high: int) -> int:
    """The size whose count, which grows with it, is nearest to what is wanted.

    The next size that is tried lies on the line between the ends, and in the middle where the line has twice moved the
    same end.
    """
    least, most = count(low), count(high)
    moved = 0  # which end, and how often in a row: -2 is the high one, twice
    while high - low > 1 and least < wanted < most:
        on_line = low + round((wanted - least) / (most - least) * (high - low))
        if abs(moved) == 2:
            on_line, moved = (low + high) // 2, 0
        middle = min(max(on_line, low + 1), high - 1)
        now = count(middle)
        if now <= wanted:
            low, least, moved = middle, now, max(moved, 0) + 1
        else:
            high, most, moved = middle, now, min(moved, 0) - 1
    return low if abs(least - wanted) <= abs(most - wanted) else high


def flops_of_model(model: nn.Module, length: int) -> int:
    """Operations (a multiply-add counts 2) of one sequence of that length: every matrix at every position, and mixing.

    Of the model's own attention, the scores and sums of all positions by all.
    """
    total, inside = 0, set()
    for module in model.modules():
        if isinstance(module, Part):
            inside |= {id(one) for one in module.modules()}
            total += length * module.flops + (module.mixing_flops(length) if isinstance(module, Mixer) else 0)
    for module in model.modules():
        if id(module) not in inside and isinstance(module, (nn.Linear, Conv1D)):
            total += 2 * length * module.weight.numel()
    config: Any = model.config
    mixers = sum(isinstance(module, Mixer) for module in model.modules())
    plain = config.num_hidden_layers - mixers
    return total + plain * 4 * length * length * config.hidden_size
