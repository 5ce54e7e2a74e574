"""Ways to make a classifier of a masked language model, from a blank with label words to a head on [CLS].

The last three take one cause of the difference away after another (Raman et al., 2023, section 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....forward import logits_at
from ....goals import PromptClassifier
from .grammar import TEMPLATE, WORDS, World


class Way(ABC):
    """A classifier whose every number is trained."""

    def __init__(self, world: World) -> None:
        self.model, self.tokenizer = world.model, world.tokenizer

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All that is trained, by name."""
        return dict(self.model.named_parameters())

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as the model takes them."""
        return dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))

    @abstractmethod
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of every class (B x C)."""

    def losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of every example the cross-entropy, and whether it is right (B)."""
        scores = self.scores({name: tensor for name, tensor in batch.items() if name != "labels"})
        return functional.cross_entropy(scores, batch["labels"], reduction="none"), scores.argmax(-1) == batch["labels"]


class Blank(Way):
    """Label words at a blank behind the text: mvp."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.prompt = PromptClassifier(world.model, world.tokenizer, TEMPLATE, WORDS).goal.prompt

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.prompt.encode(texts)

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.prompt.scores(self.model, batch)


class WordsAtCls(Way):
    """Label words at [CLS], without a template."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.ids = [world.tokenizer.convert_tokens_to_ids(words) for words in WORDS.values()]

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        first = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        first[:, 0] = True
        logits = torch.cat(list(logits_at(self.model, batch, first)))
        return torch.stack([logits[:, ids].max(-1).values for ids in self.ids], -1)


class Head(Way):
    """A random head on [CLS]: linear, or with a dense layer and tanh before it, as in the usual fine-tuning."""

    def __init__(self, world: World, dense: bool, seed: int) -> None:
        super().__init__(world)
        width, start = world.model.config.hidden_size, world.model.config.initializer_range
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Linear(width, width), nn.Tanh()] if dense else []
            self.head = nn.Sequential(*layers, nn.Linear(width, len(WORDS)))
            for parameter in self.head.parameters():
                nn.init.normal_(parameter, std=start) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        body = {f"body.{name}": parameter for name, parameter in self.model.base_model.named_parameters()}
        return body | {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        given: Any = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.head(self.model.base_model(**given).last_hidden_state[:, 0])


def ways(world: World, seed: int) -> dict[str, Way]:
    """Each way on the world's model."""
    return {
        "mvp": Blank(world), "words at [CLS]": WordsAtCls(world), "linear head": Head(world, False, seed),
        "head": Head(world, True, seed),
    }  # fmt: skip
