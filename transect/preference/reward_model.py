"""A reward model: prompts go to the scorer of their category, whose rewards they get. As one folder on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..arguments import Range, accepted, checked_fields
from ..checkpoint import check_output, open_model, placed
from ..checkpoint.base import note_base
from ..checkpoint.folder import check_files
from ..checkpoint.processors import load_processors
from ..checkpoint.save import save_base
from ..data import Preference
from ..data.encoded import encoded, padded
from ..errors import BadCheckpoint, BadData, TransectError
from ..forward import at_rest
from ..store import in_short, keep_json, kept_json
from .pairwise import pair_accuracy
from .scorer import Router, Scorer, adapter_of

CARD, OF = "reward_model.json", "a reward model"
_HEADS, _BACKBONE = "heads.safetensors", "backbone"


@dataclass
class RewardModel:
    """A scorer for each category, and the router that chooses one by the prompt.

    Higher is better, and only differences between answers to one prompt mean something. router: None where there is
    one category. tokenizer: of all backbones. length: the most tokens of a prompt with its answer; of longer ones the
    end counts. training: how it came to be, as JSON.
    """

    categories: tuple[str, ...]
    scorers: list[Scorer]
    router: Router | None
    tokenizer: Any
    length: int
    training: dict[str, Any] = field(default_factory=dict)

    def route(self, prompts: Sequence[str], batch_size: int = 32) -> list[int]:
        """The number of each prompt's category."""
        if self.router is None:
            return [0] * len(prompts)
        found: list[int] = []
        rows = encoded(prompts, self.tokenizer, self.router.backbone, self.length) if len(prompts) else []
        with torch.no_grad(), at_rest(self.router):
            for start in range(0, len(rows), batch_size):
                found += self.router(padded(rows[start : start + batch_size])).argmax(-1).tolist()
        return found

    def score(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """The reward (n, on the CPU) of each answer to its prompt; of the chosen categories' scorers alone.

        categories: of each prompt, where the router is not to choose. TransectError for an unknown one.
        """
        if len(prompts) != len(answers):
            raise TransectError(f"there are {len(prompts)} prompts and {len(answers)} answers: each prompt needs one")
        if not len(prompts):
            raise BadData("there are no prompts and answers to score")
        if categories is not None and len(categories) != len(prompts):
            raise TransectError(
                f"there are {len(prompts)} prompts and {len(categories)} categories: name each prompt's"
            )
        if categories is None:
            once = list(dict.fromkeys(prompts))
            by_prompt = dict(zip(once, self.route(once, batch_size), strict=True))
            chosen = [by_prompt[prompt] for prompt in prompts]
        else:
            chosen = [self.number_of(category) for category in categories]
        rewards = torch.zeros(len(prompts))
        for number in sorted(set(chosen)):
            places = [place for place, one in enumerate(chosen) if one == number]
            texts = [prompts[place] + answers[place] for place in places]
            rewards[places] = self._scored(self.scorers[number], texts, batch_size)
        return rewards

    def _scored(self, scorer: Scorer, texts: Sequence[str], batch_size: int) -> Tensor:
        """Rewards of texts, those of about one length together."""
        rows = encoded(texts, self.tokenizer, scorer.backbone, self.length)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        found = torch.zeros(len(rows))
        with torch.no_grad(), at_rest(scorer):
            for start, end in pairwise([*range(0, len(rows), batch_size), len(rows)]):
                part = order[start:end]
                found[part] = scorer(padded([rows[place] for place in part])).float().cpu()
        return found

    def accuracy(
        self, preferences: Sequence[Preference], *, routed: bool = True, batch_size: int = 32
    ) -> dict[str, float]:
        """Share of the pairs in which the better answer gets more (a tie is wrong), by category, and of `all` pairs.

        Only pairs without an aspect count: a reward is of the answer as a whole. routed: as at use; otherwise each pair
        by its own category's scorer. BadData if there is no such pair.
        """
        preferences = [pair for pair in preferences if pair.aspect is None]
        if not preferences:
            raise BadData("there are no preferences without an aspect to judge by")
        asked: dict[str, Any] = {"batch_size": batch_size}
        prompts = [pair.prompt for pair in preferences]
        if not routed:
            asked["categories"] = [pair.category for pair in preferences]
        better = self.score(prompts, [pair.better for pair in preferences], **asked)
        worse = self.score(prompts, [pair.worse for pair in preferences], **asked)
        found = {}
        for category in dict.fromkeys(pair.category for pair in preferences):
            mine = torch.tensor([pair.category == category for pair in preferences])
            found[category] = pair_accuracy(better[mine], worse[mine])
        return {**found, "all": pair_accuracy(better, worse)}

    def number_of(self, category: str) -> int:
        """The place of a category of that name; TransectError if there is none."""
        if category not in self.categories:
            known = ", ".join(map(repr, self.categories))
            raise TransectError(f"the category {category!r} is unknown; this reward model has {known}")
        return self.categories.index(category)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything into one folder: backbones as checkpoints, aspects as PEFT's adapters, all heads.

        Whole or not at all. Raises TransectError for a folder with something in it, without `overwrite`.
        """
        target = check_output(folder, overwrite)
        with placed(target, CARD) as partial:
            for number, scorer in enumerate(self.scorers):
                place = partial / f"category-{number}"
                save_base(scorer.backbone, place / _BACKBONE)
                note_base(scorer.backbone, target / place.name / _BACKBONE)
                if scorer.aspects:
                    for config in scorer.peft.peft_config.values():
                        config.base_model_name_or_path = str(target / place.name / _BACKBONE)
                    scorer.peft.save_pretrained(str(place), save_embedding_layers=False)
                save_file({k: t.detach().cpu().contiguous() for k, t in scorer.heads().items()}, place / _HEADS)
            if self.router is not None:
                save_base(self.router.backbone, partial / "router" / _BACKBONE)
                save_file(
                    {k: t.detach().cpu() for k, t in self.router.head.state_dict().items()}, partial / "router" / _HEADS
                )
            self.tokenizer.save_pretrained(partial)
            keep_json(partial / CARD, self.card(), OF)
        return target

    def card(self) -> dict[str, Any]:
        """What is in it, as JSON: of each category the aspects, and whether an aggregator joins them."""
        categories = [
            {"name": name, "aspects": list(scorer.aspects), "aggregator": scorer.aggregator is not None}
            for name, scorer in zip(self.categories, self.scorers, strict=True)
        ]
        return {"categories": categories, "length": self.length, "training": self.training}

    @staticmethod
    def load(folder: str | Path) -> RewardModel:
        """What `save` wrote. Raises BadCheckpoint for a folder that is none, or is damaged."""
        folder = Path(folder).expanduser()
        card = kept_json(folder / CARD, OF)
        if card is None:
            raise BadCheckpoint(f"{folder} holds no reward model: there is no {CARD} in it that is whole")
        try:
            return _loaded(folder, card)
        except BadCheckpoint:
            raise
        except Exception as error:  # a card that somebody made up, and each library in its own way
            raise BadCheckpoint(f"the reward model in {folder} cannot be loaded: {in_short(error)}") from error


@dataclass(frozen=True)
class _Category:
    """What the card says of a category."""

    name: str
    aspects: Sequence[str]
    aggregator: bool


def _loaded(folder: Path, card: Mapping[str, Any]) -> RewardModel:
    """What a reward model's folder holds, by its card; any error for what makes no sense."""
    check_files(folder)
    length = accepted(Annotated[int, Range(1)], card["length"], f"{CARD}: length")
    training = accepted(Mapping[str, Any], card["training"], f"{CARD}: training")
    categories = [checked_fields(_Category(**entry), f"{CARD}: categories") for entry in card["categories"]]
    names = tuple(entry.name for entry in categories)
    if not names or len(set(names)) < len(names):
        raise BadCheckpoint(f"{folder / CARD} should name one category or several, each once")
    scorers = []
    for number, entry in enumerate(categories):
        place = folder / f"category-{number}"
        check_files(place)
        scorer = Scorer(open_model(place / _BACKBONE).model)
        if entry.aspects:
            if missing := [k for k in range(len(entry.aspects)) if not (place / adapter_of(k)).is_dir()]:
                raise BadCheckpoint(f"{place / adapter_of(missing[0])} is not there: the folder is incomplete")
            scorer.load_aspects(entry.aspects, place)
        if entry.aggregator:
            scorer.add_aggregator()
        _load_heads(scorer, place / _HEADS, set(scorer.heads()))
        scorers.append(scorer.eval())
    router = None
    if len(scorers) > 1:
        check_files(folder / "router")
        router = Router(open_model(folder / "router" / _BACKBONE).model, len(scorers)).eval()
        _load_heads(router.head, folder / "router" / _HEADS, set(router.head.state_dict()))
    tokenizer, _ = load_processors(str(folder))
    return RewardModel(names, scorers, router, tokenizer, length, dict(training))


def _load_heads(module: torch.nn.Module, path: Path, expected: set[str]) -> None:
    """Read the named numbers of a module, all of them and no other; BadCheckpoint where that cannot be."""
    try:
        found = load_file(path)
        if found.keys() != expected:
            raise ValueError(f"it holds {', '.join(sorted(found))}, not {', '.join(sorted(expected))}")
        if odd := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(f"{odd[0]} holds NaN or infinite values")
        module.load_state_dict(found, strict=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None
