"""Any text: which token comes next."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from ..data.sources import rows_of
from ..data.text import documents, token_stream
from ..errors import BadData, TransectError
from ..parameters import Range
from ..pretrained import pretrained
from ..store import tensor_bytes
from .registry import Drawn, task

_OURS = ("organism", "pydoc")  # names of data with a part for training and one that is held out
_TOKENS = 300_000  # of the bundled world's text, where it is named
_HELD_OUT = 0.1  # share of a text, its end, where no other text is named to be held out


def _source(*, data: str, eval_data: str, tokenizer: str, length: int) -> str:
    """The tokens of both texts, so that other words under the same name are another contest."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in _texts(data, eval_data, tokenizer, length):
        digest.update(f"{len(tokens)};".encode())
        digest.update(tensor_bytes(tokens))
    return digest.hexdigest()


@task("text", paper="Transect's own", source=_source)
def text(
    count: int, generator: torch.Generator, *, data: str = "pydoc:calibration", eval_data: str = "",
    tokenizer: str = "bytes", length: Annotated[int, Range(2, 2**20)] = 128,
) -> Drawn:  # fmt: skip
    """Pieces of a text, in which every token is to be told from those before it.

    Pieces to train on begin anywhere in `data`. Of the held-out text the first half chooses rates, and the second half
    judges.

    data: a file or folder (.txt, .jsonl, .parquet), a hub data set, or a name of ours (pydoc:calibration).
    eval_data: the same for held-out text; by default that of a name of ours, or else the last tenth of the data.
    tokenizer: bytes, or the name of a model whose tokenizer is used.
    length: tokens in a piece.
    """
    train, first, second = _texts(data, eval_data, tokenizer, length)
    seed = generator.initial_seed()
    stream = train if seed % 2 == 0 else first if seed % 4 == 1 else second
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator)
    tokens = stream[starts + torch.arange(length)].long()
    answers = torch.ones(count, length, dtype=torch.bool)
    answers[:, 0] = False
    return Drawn(tokens, answers, 256 if tokenizer == "bytes" else len(tokenizer_of(tokenizer)))


def _texts(data: str, held_out: str, tokenizer: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens to train on, and both halves of the held-out ones."""
    kind, colon, _ = data.partition(":")
    if not held_out and colon and kind in _OURS:
        held_out = f"{kind}:heldout"
    train = _stream(data, tokenizer, _state(data))
    if held_out:
        other = _stream(held_out, tokenizer, _state(held_out))
    else:
        end = len(train) - int(_HELD_OUT * len(train))
        train, other = train[:end], train[end:]
    halves = train, other[: len(other) // 2], other[len(other) // 2 :]
    for tokens, name in zip(halves, (data, held_out or data, held_out or data), strict=True):
        if len(tokens) < length:
            raise BadData(
                f"text: {name!r} is too short: {len(tokens)} tokens for a part of it (training, choosing, judging), "
                f"and a piece has {length}"
            )
    return halves


def _state(data: str) -> tuple[int, ...]:
    """What changes with a file, so that one is read again that has been written anew."""
    try:
        path = Path(data).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return tuple(number for file in files for number in (file.stat().st_mtime_ns, file.stat().st_size))
    except (OSError, ValueError, RuntimeError):  # no file, but a name
        return ()


@lru_cache(maxsize=4)
def _stream(data: str, tokenizer: str, state: tuple[int, ...]) -> Tensor:
    """All tokens of a text (n); a byte 0, or the tokenizer's end of a sequence, stands between documents."""
    texts = documents(rows_of(data, _TOKENS))
    if tokenizer != "bytes":
        return token_stream(texts, tokenizer_of(tokenizer))
    joined = b"\0".join(document.encode() for document in texts)
    return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy())


@lru_cache(maxsize=2)
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model; `organism` is the bundled one."""
    from transformers import AutoTokenizer

    from ..organism import MODEL_PATH

    try:
        return pretrained(AutoTokenizer, MODEL_PATH if name == "organism" else name)
    except (OSError, ValueError, KeyError) as reason:
        raise TransectError(
            f"{name[:200]!r} has no tokenizer that can be loaded; name a model's folder, `organism` or `bytes`"
        ) from reason
