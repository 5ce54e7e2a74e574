"""Facts of tiny random models, for the tests of what edits them."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import VOCABULARY, tiny
from tests.test_data import word_tokenizer
from transect.anatomy import Anatomy
from transect.data import Fact, Passage, Specimen, load

EDITS = ["rome", "memit", "constrained-ft"]
# the activations of a tiny random model are so small that the decay, which has a unit, would outweigh all else
QUICK: dict[str, dict[str, Any]] = {
    "rome": {"contexts": 2, "steps": 4, "decay": 0, "learning_rate": 0.1, "rounds": 1},
    "memit": {"contexts": 2, "steps": 4, "decay": 0},
    "constrained-ft": {"steps": 4},
}
WORDS = word_tokenizer()


def word(token: int) -> str:
    return WORDS.decode([token]).strip()


def ranking(model: Any, prompt: str) -> list[str]:
    """The words, from what the model says first after a prompt to what it says last."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([WORDS(prompt)["input_ids"]])).logits[0, -1]
    return [word(int(token)) for token in logits.argsort(descending=True) if token >= 7]


def sure(model: Any) -> Any:
    """The special tokens are never said, so that what is said first is a word."""
    head = model.get_output_embeddings()
    bias = torch.zeros(VOCABULARY, dtype=head.weight.dtype)
    bias[:7] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def specimen_of(name: str = "llama", count: int = 2, dtype: torch.dtype = torch.float64, answer: int = 0) -> Specimen:
    """Facts whose answer is what the model says `answer`-th and whose new answer is what it says third."""
    model = sure(tiny(name, dtype=dtype))
    ids = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
    facts = []
    for number in range(count):
        subject = f"w{10 + number} w11"
        said = ranking(model, f"w3 {subject} w5")
        near = f"w3 w{30 + number} w31 w5"
        facts.append(
            Fact(
                "w3 {} w5",
                subject,
                said[answer],
                said[2],
                (f"w7 {subject}",),
                (Passage(near, ranking(model, near)[0]),),
            )
        )
    return Specimen(Anatomy(model), WORDS, load(ids, model), facts)


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert set(now) == set(before)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
