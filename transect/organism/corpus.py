"""Text of the world for other programs: the mix that the model was trained on, as lines of plain text.

One document a line. Joined by newlines and written to a .txt file, the text is tokenised by the generic path
`tokenizer(text)` just as in training: the newline is the end-of-document token.
"""

from functools import cache
from random import Random

from transect.organism.documents import documents
from transect.organism.tokenizer import TOKEN
from transect.organism.world import World

SPLITS = ("train", "calibration", "heldout")

_world = cache(World)


def corpus(split: str, n_tokens: int, seed: int | None = None) -> list[str]:
    """Documents of a split, of `n_tokens` tokens or just over with their newlines.

    What is drawn at random (sums, lists, notes, options, prose) differs between splits and seeds; the facts and the
    memorised passages are the same everywhere. Held-out sums and unseen passages occur in no split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    rng = Random(f"{split} {seed or 0}")
    lines: list[str] = []
    total = 0
    while total < n_tokens:
        (document,) = documents(_world(), rng, 1)
        lines.append(" ".join(example.text for example in document))
        total += len(TOKEN.findall(lines[-1])) + 1
    return lines
