"""Untrained models side by side: each trained from scratch on the same batches in the same order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import torch
from transformers import AutoModelForCausalLM

from ..data import Batches
from ..evaluation import evaluate_loss
from ..statistics import Progress
from ..store import Folder, keep_json, kept_json
from ..training import Machine, Problem, Run, Schedule, State, own_loss, train
from ..version import __version__

Build = Callable[[Any], Any]


def train_architectures(
    configs: Mapping[str, Any],
    training: Batches,
    held_out: Batches,
    schedule: Schedule,
    *,
    seed: int = 0,
    build: Build = AutoModelForCausalLM.from_config,
    folder: Folder | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """What a short training makes of each architecture, by its name.

    configs: Hugging Face configs by name. seed: of the weights. build: makes a model with random weights of a config.
    folder: where each result is written when it is there; the same call does not train that one again.

    Each result has `loss` (mean on the held-out text, nats), `parameters`, `steps`, `tokens` and `seconds`. Raises
    Diverged, naming the architecture, if the loss of one is not finite any more.
    """
    if folder is not None:
        folder.take()
    found = {}
    for name in progress(list(configs), "architectures") if progress else configs:
        of, file = _of(configs[name], build, training, held_out, schedule, seed, device), f"{quote(name, safe='')}.json"
        result = None if folder is None else kept_json(folder.path / file, of)
        if result is None:
            result = _train_one(name, configs[name], build, training, held_out, schedule, seed, device)
            if folder is not None:
                keep_json(folder.file(file), result, of)
        found[name] = result
    return found


def _of(
    config: Any, build: Build, training: Batches, held_out: Batches, schedule: Schedule, seed: int, device: str
) -> str:
    """Everything that decides a training's numbers."""
    texts = [training.fingerprint, held_out.fingerprint]
    made_by = f"{build.__module__}.{build.__qualname__}"
    decides = [__version__, config.to_dict(), made_by, texts, asdict(schedule), seed, device]
    return json.dumps(decides, sort_keys=True, default=str)


def _train_one(
    name: str,
    config: Any,
    build: Build,
    training: Batches,
    held_out: Batches,
    schedule: Schedule,
    seed: int,
    device: str,
) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config).float().to(device)
    problem = Problem(
        name, dict(model.named_parameters()), list(training), lambda batch: own_loss(model, batch), None, model.train,
        tokens=[int(batch["input_ids"].numel()) for batch in training],
    )  # fmt: skip
    course = train(problem, Run(schedule, Machine(device), State(None)), {})
    return {
        "loss": evaluate_loss(model, held_out).loss, "parameters": course.numbers, "steps": course.steps,
        "tokens": course.tokens, "seconds": course.seconds,
    }  # fmt: skip
