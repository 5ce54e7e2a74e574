"""Running trials: what one process does with the model and the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adaptation import adapter_named, way_named
from ..adaptation.targets import targets_of
from ..anatomy import Anatomy
from ..compression.fingerprint import model_fingerprint
from ..data import Batches
from ..errors import Diverged, OutOfReach, TransectError
from ..evaluation import evaluate_loss, parameters
from ..store import keep_json
from ..training import Machine, State
from .plan import Plan, Trial
from .trials import UNFINISHED


class Worker:
    """Holds the base model and runs any trial of the plan on a copy of it."""

    def __init__(self, folder: Path, plan: Plan, model: Any, training: Batches, texts: Mapping[str, Batches]) -> None:
        self.folder, self.plan, self.model = folder, plan, model
        self.training, self.texts = training, texts

    def run(self, trials: Sequence[Trial], on_trial: Callable[[Trial], None]) -> None:
        """Run the trials, and write each as soon as it is there."""
        for trial in trials:
            keep_json(self.folder / trial.file, self.compute(trial), self.plan.of(trial))
            on_trial(trial)

    def compute(self, trial: Trial) -> dict[str, Any]:
        """One trial; what the method cannot do, or what diverges, has a note instead of numbers."""
        from ..adaptation.adapt import adapt_anatomy  # peft takes a second to import

        if trial.entrant is None:
            found = {name: evaluate_loss(self.model, text) for name, text in self.texts.items()}
            texts = {name: {"loss": each.loss, "examples": list(each.examples)} for name, each in found.items()}
            return {"texts": texts, "parameters": parameters(self.model)}
        anatomy = Anatomy(copy.deepcopy(self.model))
        entrant, way = trial.entrant, way_named(trial.entrant.name)
        state = State(self.folder / UNFINISHED / Path(trial.file).stem)
        try:
            options = dict(self.plan.adapters[entrant.name])
            if entrant.share is not None:
                options[way.size] = self._size(anatomy, entrant.share, entrant.name)
            settings = replace(
                self.plan.shared, method=entrant.name, options=options, lr=trial.rate, seed=trial.seed
            )  # fmt: skip
            _, outcome = adapt_anatomy(
                anatomy, settings, self.training, self.texts, machine=Machine(self.plan.device), state=state,
                examples=True,
            )  # fmt: skip
        except OutOfReach as reason:
            return {"note": str(reason)}
        except Diverged as reason:
            state.remove()
            return {"note": str(reason)}
        state.remove()
        return {**outcome, "size": options.get(way.size)}

    def _size(self, anatomy: Anatomy, share: float, name: str) -> int:
        targets = targets_of(anatomy, self.plan.shared.roles)
        most = int(share * sum(d_out * d_in for d_out, d_in in targets.values()))
        return adapter_named(name).size_in(anatomy.model, list(targets), most, self.plan.adapters[name])


def load_worker(folder: Path, plan: Plan) -> Worker:
    """A worker in a fresh process: the model from its folder or hub name, the data from the run folder."""
    from ..checkpoint import open_model

    opened = open_model(plan.model, dtype=plan.dtype, device=plan.device, architecture=plan.architecture)
    if model_fingerprint(opened.model) != plan.weights:
        raise TransectError(
            f"{plan.model} holds other weights than the model of this contest, so that other processes cannot load it: "
            "save the model first and name its folder, or use one process (workers=1, --workers 1)"
        )
    texts = {name: Batches.load(folder / text_file(name), of) for name, of in plan.texts.items()}
    return Worker(folder, plan, opened.model, Batches.load(folder / text_file("training"), plan.training), texts)


def text_file(name: str) -> str:
    """Where a text lies in the run folder."""
    return f"{name}.safetensors"
