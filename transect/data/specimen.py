"""A model on the table: with its tokenizer, text, and questions about what it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Anatomy, Matrix
from ..errors import BadData, NotApplicable, TransectError
from ..forward.lens import Lens
from ..forward.objective import task_of
from .batches import Batches
from .questions import Choice, Fact, Passage
from .text import specials_of
from .tokenised import embedded


@dataclass(frozen=True)
class Specimen:
    """What probes and edits are given. Asking for what is not there raises NotApplicable, which says what to pass.

    name: what the user calls it. data: text as batches. questions: facts, choices and
    passages. progress: wraps a loop to show it, or None.
    """

    anatomy: Anatomy
    tokenizer: Any = None
    data: Batches | None = None
    known_facts: Sequence[Fact] = ()
    known_choices: Sequence[Choice] = ()
    known_passages: Sequence[Passage] = ()
    seed: int = 0
    name: str = ""
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = field(default=None, compare=False)

    @property
    def model(self) -> Any:
        return self.anatomy.model

    @property
    def layers(self) -> int:
        return len(self.anatomy.block_list)

    @property
    def text(self) -> Batches:
        """Batches of token ids (or images)."""
        if self.data is None:
            raise NotApplicable("it needs text: pass data (--data)")
        return self.data

    @property
    def facts(self) -> Sequence[Fact]:
        if not self.known_facts:
            raise NotApplicable("it needs facts with their subjects: pass facts (--facts)")
        return self.known_facts

    @property
    def choices(self) -> Sequence[Choice]:
        if not self.known_choices:
            raise NotApplicable("it needs multiple-choice items: pass choices (--choices)")
        return self.known_choices

    @property
    def passages(self) -> Sequence[Passage]:
        if not self.known_passages:
            raise NotApplicable("it needs passages with their endings: pass passages (--passages)")
        return self.known_passages

    @property
    def lens(self) -> Lens:
        """The logit lens; NotApplicable where the model predicts no next token."""
        return Lens(self.anatomy)

    def matrices(self, roles: Iterable[str] | None = None) -> list[Matrix]:
        """The blocks' matrices of these roles; NotApplicable where there is none."""
        found = self.anatomy.matrices(roles)
        if not found:
            raise NotApplicable("the blocks have no such matrices: they were dropped, or parts stand in their places")
        return found

    def require_causal(self) -> None:
        """NotApplicable unless the model predicts the next token."""
        if task_of(self.model) != "causal":
            raise NotApplicable(
                f"it is about models that predict the next token, and {type(self.model).__name__} does not"
            )

    def require_contributions(self) -> None:
        """NotApplicable where what sublayers add is not all that a block adds: norms behind the sum, a part around."""
        led = next((block for block in self.anatomy.blocks if not block.adds_up), None)
        if led is not None:
            raise NotApplicable(
                f"a part stands around block {led.index}: what its attention and MLP add is not all that it adds"
            )
        if any(block.post_norm for block in self.anatomy.blocks):
            raise NotApplicable(
                f"{type(self.model).__name__} normalises after the residual sum, so its sublayers do not add up "
                "in one stream"
            )

    def require_own_sublayers(self) -> None:
        """NotApplicable where a part stands in the place of attention or MLP, or of a matrix in them."""
        for block in self.anatomy.blocks:
            for unit in ("attention", "mlp"):
                if block.has_part(unit):
                    raise NotApplicable(
                        f"it goes into heads and neurons, and a part stands in the {unit} of block {block.index}"
                    )

    def shown(self, items: Iterable[Any], label: str) -> Iterable[Any]:
        """The items, with a progress bar if there is one."""
        return self.progress(items, label) if self.progress else items

    def encode(self, text: str) -> Tensor:
        """Token ids (T) of a prompt, on the CPU, with what the tokenizer puts before a text, not behind it."""
        ids = self._words(text)["input_ids"]
        ids = ids[: len(ids) - self._behind]
        rows, context = embedded(self.model), getattr(self.anatomy.config, "max_position_embeddings", None)
        if max(ids, default=0) >= rows:
            raise BadData(f"the prompt {text!r} has the token {max(ids)}, but the model's embedding has {rows} rows")
        if context is not None and len(ids) > context:
            raise TransectError(f"a prompt of {len(ids)} tokens is longer than the model's context of {context}")
        return torch.tensor(ids, dtype=torch.long)

    def continuation(self, prompt: str, answer: str) -> Tensor:
        """Token ids (n) of an answer that follows a prompt after one space, as the tokenizer writes it there.

        Where the answer changes how the prompt's end is cut into tokens, as it is written behind a colon.
        """
        for context in (prompt, ":"):
            before, whole = self.encode(context), self.encode(f"{context} {answer}")
            if len(whole) > len(before) and torch.equal(whole[: len(before)], before):
                return whole[len(before) :]
        raise BadData(f"the answer {answer!r} has no tokens of its own behind {prompt!r}")

    def single_token(self, prompt: str, word: str) -> int:
        """The id of a word that follows a prompt after one space; NotApplicable where it is several tokens."""
        ids = self.continuation(prompt, word)
        if len(ids) != 1:
            raise NotApplicable(f"{word!r} is {len(ids)} tokens of this tokenizer, and it has to be one")
        return int(ids[0])

    def span(self, text: str, part: str) -> tuple[int, int]:
        """Which tokens of `encode(text)` hold the first occurrence of `part`, as (first, last + 1).

        Raises BadData where the text does not hold it, or the tokenizer cannot say where its tokens stand.
        """
        start = text.find(part)
        if start < 0 or not part:
            raise BadData(f"{part!r} does not occur in the prompt {text!r}")
        return self.span_of(text, start, start + len(part))

    def span_of(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Which tokens of `encode(text)` hold the characters start to end - 1, as (first, last + 1)."""
        if not getattr(self._words, "is_fast", False):
            raise BadData(f"{type(self._words).__name__} does not say where its tokens stand in a text; use a fast one")
        offsets = self._words(text, return_offsets_mapping=True)["offset_mapping"]
        inside = [number for number, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        if not inside:
            raise BadData(f"{text[start:end]!r} is not found in the prompt {text!r} after tokenization")
        return inside[0], inside[-1] + 1

    def decode(self, ids: Any) -> str:
        """The text of some token ids, or of one."""
        ids = [int(ids)] if isinstance(ids, int) or (isinstance(ids, Tensor) and ids.dim() == 0) else list(ids)
        return self._words.decode(ids)

    def token(self, number: int) -> str:
        """One token as a reader sees it, spaces included."""
        return self.decode(int(number)) if self.tokenizer is not None else str(number)

    def sequences(self, count: int, length: int) -> Tensor:
        """The beginnings of the first `count` sequences of the text that are long enough (count x length), on the CPU.

        Fewer where there are fewer; NotApplicable where there is none.
        """
        rows = [row[:length] for row in self.text.texts() if len(row) >= length]
        if not rows:
            raise NotApplicable(f"it needs a text of at least {length} tokens in one sequence")
        return torch.stack(rows[:count]).cpu()

    @property
    def _words(self) -> Any:
        if self.tokenizer is None:
            raise NotApplicable("it needs the model's tokenizer: pass tokenizer=AutoTokenizer...")
        return self.tokenizer

    @cached_property
    def _behind(self) -> int:
        """How many tokens the tokenizer puts behind a text."""
        return len(specials_of(self._words)[1])
