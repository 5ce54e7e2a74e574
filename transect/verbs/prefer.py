"""`transect.prefer`: a reward model from preferences between answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from ..arguments import checked
from ..checkpoint import check_output
from ..data import load_preferences
from ..parameters import Seed, listed
from ..preference import RewardModel, Settings, train_reward_model
from ..statistics import Progress
from ..store import alone
from ..training import Check, Machine, State
from .arguments import Device, FolderName, Length, Role, Some
from .common import opened_of

KIND = "an unfinished reward model"  # what the folder of one is


@checked
def prefer(
    model: Any,
    data: Any,
    *,
    eval_data: Any = None,
    out: FolderName | None = None,
    checkpoint: FolderName | None = None,
    tokenizer: Any = None,
    categories: Annotated[Sequence[str], Some] | None = None,
    aspects: Annotated[Sequence[str], Some] | None = None,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.05,
    roles: Annotated[Sequence[Role], Some] | None = ("q", "v"),
    base_share: float = 0.6,
    lr: float = 1e-5,
    aspect_lr: float = 3e-4,
    aggregator_lr: float = 1e-3,
    router_lr: float = 1e-5,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 8,
    held_out: float = 0.1,
    every: int | None = None,
    sequence_length: Length | None = None,
    seed: Seed = 0,
    device: Device | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] = lambda check: None,
) -> RewardModel:
    """Train a `transect.preference.RewardModel`: of each answer to a prompt a number, the higher the better.

    model: a Hugging Face model, or the name of one. It stays as it is; every category gets a copy.
    data: preferences, see `transect.data.load_preferences`. Those with an aspect train that aspect's scorer.
    eval_data: more of them, that nothing is trained on: `result.training["accuracy"]` has the share in which the better
        answer gets more, by category.
    out: a folder for the result. Unfinished work lies beside it, and the same call goes on from there.
    checkpoint: a folder for unfinished work, where there is no `out`. It is removed at the end.
    categories, aspects: those that there must be, the aspects in every category. Default: those of the data.
    rank ... seed: see `transect.preference.Settings`. sequence_length: tokens of a prompt with its answer; of a longer
        one the end is taken. device: where to train. Default: where accelerate puts it (a GPU if there is one).

    Raises TransectError before any training if something cannot be done.
    """
    settings = Settings(
        rank=rank, alpha=alpha, dropout=dropout, roles=None if roles is None else listed(roles), base_share=base_share,
        lr=lr, aspect_lr=aspect_lr, aggregator_lr=aggregator_lr, router_lr=router_lr, epochs=epochs, steps=steps,
        batch_size=batch_size, held_out=held_out, every=every, seed=seed,
    ).resolved()  # fmt: skip
    target = None if out is None else check_output(out, overwrite)
    places = [Path(place) for place in (target, checkpoint) if place is not None]
    if target is not None and checkpoint is None:
        checkpoint = target.parent / f".{target.name}.preference"
    machine = Machine(device)
    state = State(None if checkpoint is None else Path(checkpoint), writes=machine.is_main, kind=KIND)
    state.check_place()
    pairs = load_preferences(data, categories=categories, aspects=aspects)
    judging = None if eval_data is None else load_preferences(eval_data)
    opened = opened_of(model, tokenizer)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(alone(place))
        reward = train_reward_model(
            opened.model, opened.tokenizer, pairs, settings, categories=categories, aspects=aspects,
            sequence_length=sequence_length, machine=machine, state=state, progress=progress, on_check=on_check,
        )  # fmt: skip
        if judging is not None:
            reward.training["accuracy"] = reward.accuracy(judging)
        if target is not None and machine.is_main:
            reward.save(target, overwrite=overwrite)
        machine.wait()
        state.remove()
    return reward
