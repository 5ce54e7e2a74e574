"""The reward of one category: a backbone with a value head, adapters for its aspects, and what joins these."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adaptation import adapter_named
from ..adaptation.targets import targets_of
from ..anatomy import Anatomy
from ..checkpoint.folder import check_files
from ..errors import BadCheckpoint, TransectError
from ..forward import Batch, inputs_of
from ..store import read_json
from .pairwise import last_states

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def states_of(model: Any, batch: Batch) -> Tensor:
    """h (B x D, float32 or wider): the body's last hidden state at each sequence's last real token."""
    hidden = model.base_model(**inputs_of(model, batch, body=True)).last_hidden_state
    found = last_states(hidden, batch.get("attention_mask"))
    return found.to(torch.promote_types(found.dtype, torch.float32))


def width_of(model: Any) -> int:
    """D, the width of `states_of`."""
    return model.config.get_text_config().hidden_size


class Scorer(nn.Module):
    """Rewards (B) of prompts with their answers, in three stages of which each stands on the one before it.

    At first v · h + c, of the backbone's state h and the value head (v, c). `add_aspects`: K adapters on the backbone,
    each with a copy of the value head. `add_aggregator`: from then on the reward is an MLP of the K states side by
    side.

    backbone: a Hugging Face model, of which the body alone is used.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.aspects = backbone, ()
        width = width_of(backbone)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.bias)  # which no pair can tell anything about
        self.aspect_heads = nn.ModuleList()
        self.aggregator: nn.Sequential | None = None
        self._wrapper: list[PeftModel] = []  # around the backbone: in a list, so that it is not a module of this one

    @property
    def peft(self) -> PeftModel:
        """The one PEFT model around the backbone that holds every aspect's adapter."""
        return self._wrapper[0]

    def add_aspects(self, aspects: Sequence[str], roles: Sequence[str] | None, options: Mapping[str, Any]) -> None:
        """An adapter for each aspect, whose reward is at first that of the value head.

        roles: the matrices that are adapted. options: LoRA's settings. TransectError for what does not fit the model.
        """
        if not aspects:
            raise TransectError("there are no aspects to add")
        targets, adapter = aspect_targets(self.backbone, roles, options), adapter_named("lora")
        for number in range(len(aspects)):
            self._add_adapter(number, adapter.config(targets, options))
        self._name_aspects(aspects)
        for head in self.aspect_heads:
            head.load_state_dict(self.head.state_dict())

    def load_aspects(self, aspects: Sequence[str], folder: Path) -> None:
        """Adapters as `PeftModel.save_pretrained` wrote them into the folder; heads are to be loaded.

        Of what lies there nothing is taken but sizes and numbers: PEFT itself would also read pickles, ask the hub for
        what is missing, and import what a config names. BadCheckpoint for what was not written so.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        for number in range(len(aspects)):
            place, name = folder / adapter_of(number), adapter_of(number)
            config, tensors = adapter_in(place)
            self._add_adapter(number, config)
            if get_peft_model_state_dict(self.peft, adapter_name=name).keys() != tensors.keys():
                raise BadCheckpoint(
                    f"{place} does not hold the numbers of the adapter that its adapter_config.json has"
                )
            set_peft_model_state_dict(self.peft, tensors, adapter_name=name)
        self._name_aspects(aspects)

    def _add_adapter(self, number: int, config: PeftConfig) -> None:
        from peft import get_peft_model  # it takes a second to import

        with _without_notes():
            if number:
                self.peft.add_adapter(adapter_of(number), config)
            else:
                self._wrapper = [get_peft_model(self.backbone, config, adapter_name=adapter_of(number))]

    def _name_aspects(self, aspects: Sequence[str]) -> None:
        self.aspects = tuple(aspects)
        width, kind = self.head.in_features, self.head.weight
        self.aspect_heads.extend(nn.Linear(width, 1).to(kind) for _ in aspects)

    def add_aggregator(self) -> None:
        """The MLP K D -> D -> 1 with one slope, in place of the value heads: K D² + 2 D + 2 numbers."""
        if not self.aspects:
            raise TransectError("an aggregator joins aspects, and this scorer has none")
        width = self.head.in_features
        first, last = nn.Linear(len(self.aspects) * width, width), nn.Linear(width, 1)
        self.aggregator = nn.Sequential(first, nn.PReLU(), last).to(self.head.weight)

    def body_parameters(self) -> dict[str, nn.Parameter]:
        """The backbone's own numbers that a reward depends on."""
        named = self.backbone.base_model.named_parameters()
        return {f"backbone.{name}": p for name, p in named if p.is_floating_point() and "lora_" not in name}

    def aspect_parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The numbers of one aspect: its adapter's, and its head's."""
        mark = f".{adapter_of(number)}."
        adapter = {name: p for name, p in self.backbone.named_parameters() if mark in f"{name}."}
        return adapter | {f"head.{name}": p for name, p in self.aspect_heads[number].named_parameters()}

    def base_rewards(self, batch: Batch) -> Tensor:
        """r (B) of the backbone and the value head alone."""
        if not self._wrapper:
            return self.head(states_of(self.backbone, batch)).squeeze(-1)
        with self.peft.disable_adapter():
            return self.head(states_of(self.backbone, batch)).squeeze(-1)

    def aspect_states(self, batch: Batch, number: int) -> Tensor:
        """h_k (B x D), the state with that aspect's adapter."""
        self.peft.set_adapter(adapter_of(number))
        return states_of(self.backbone, batch)

    def aspect_rewards(self, batch: Batch, number: int) -> Tensor:
        """r_k (B), in that aspect alone."""
        return self.aspect_heads[number](self.aspect_states(batch, number)).squeeze(-1)

    def features(self, batch: Batch) -> Tensor:
        """z = [h_1; ...; h_K] (B x K D)."""
        return torch.cat([self.aspect_states(batch, number) for number in range(len(self.aspects))], -1)

    def aggregated(self, features: Tensor) -> Tensor:
        """r (B) of features (B x K D)."""
        assert self.aggregator is not None
        return self.aggregator(features).squeeze(-1)

    def forward(self, batch: Batch) -> Tensor:
        """r (B): the aggregator's, or without one that of the value head."""
        return self.base_rewards(batch) if self.aggregator is None else self.aggregated(self.features(batch))

    def heads(self) -> dict[str, Tensor]:
        """Every number of heads and aggregator, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}


def aspect_targets(model: Any, roles: Sequence[str] | None, options: Mapping[str, Any]) -> list[str]:
    """Paths of the layers that aspects adapt; TransectError if these adapters do not fit the model."""
    adapter, targets = adapter_named("lora"), targets_of(Anatomy(model), roles)
    adapter.check(targets, options)
    return list(targets)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Inside the `with` PEFT is silent about what it finds out by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # which way a Conv1D lies
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def adapter_in(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The LoRA in a folder, to be used and not trained, and its numbers; BadCheckpoint where there is none.

    It is as large as its numbers are, whatever its config says.
    """
    check_files(folder)
    written, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    targets = written.get("target_modules")
    if written.get("peft_type") != "LORA" or ranks != {written.get("r")} or not isinstance(targets, list):
        raise BadCheckpoint(f"{folder} holds no LoRA of the rank that its adapter_config.json says")
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    lora = adapter_named("lora")
    config = lora.config(sorted(map(str, targets)), lora.settings({names[key]: written.get(key) for key in names}))
    config.inference_mode = True
    return config, tensors


def adapter_of(number: int) -> str:
    """What PEFT calls an aspect's adapter; an aspect's own name may have dots or slashes."""
    return f"aspect-{number}"


class Router(nn.Module):
    """Logits (B x C) of the categories, of the prompt alone: a linear map of a backbone's state at its last token."""

    def __init__(self, backbone: Any, categories: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width_of(backbone), categories)

    def body_parameters(self) -> dict[str, nn.Parameter]:
        """The backbone's numbers that the logits depend on."""
        named = self.backbone.base_model.named_parameters()
        return {f"backbone.{name}": p for name, p in named if p.is_floating_point()}

    def forward(self, batch: Batch) -> Tensor:
        """Logits, not probabilities: cross-entropy takes the logarithm of their softmax itself."""
        return self.head(states_of(self.backbone, batch))
