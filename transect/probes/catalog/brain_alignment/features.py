"""What each layer says of the words of each sample, and kernels of that with delays.

Shapes: N samples, d dimensions of the residual stream, L + 1 states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import BadData
from ....forward import run_body, to_device, watch
from ...places import wide
from ...words import word_tokens
from .recordings import Recording

_BATCH = 4  # windows


@torch.no_grad()
def features_of(specimen: Specimen, recording: Recording, context: int) -> Tensor:
    """Mean of each state of the residual stream over the tokens of a sample's words ((L + 1) x N x d), on the CPU.

    Zero where a sample has no words. The model reads each run by itself, in windows of at most `context` tokens that
    overlap by half, so that every token but the first ones has half a window before it.
    """
    known = word_tokens(specimen, (word for words in recording.words for word in words))
    unknown = [word for word, ids in known.items() if not ids]
    if unknown:
        raise BadData(
            f"{len(unknown)} words of the recording are not in the tokenizer's vocabulary, such as "
            f"{', '.join(map(repr, unknown[:5]))}"
        )
    limit = getattr(specimen.anatomy.config, "max_position_embeddings", None) or context
    pieces = []  # token ids, their samples, and how many of the first do not count
    for run in recording.runs.unique().tolist():
        numbers: list[int] = (recording.runs == run).nonzero()[:, 0].tolist()
        pairs = [(token, sample) for sample in numbers for word in recording.words[sample] for token in known[word]]
        pieces += windows(pairs, min(context, limit))
    pieces.sort(key=lambda piece: len(piece[0]))
    sums: Tensor | None = None
    counts = torch.zeros(len(recording.words))
    for chosen in specimen.shown(_alike(pieces), "brain-alignment, reading"):
        ids = torch.stack([ids for ids, _, _ in chosen])
        with watch(specimen.anatomy, ["residual"]) as seen:
            run_body(specimen.model, to_device({"input_ids": ids}, specimen.model.device))
        states = [wide(seen.residual[state]).cpu() for state in range(specimen.layers + 1)]
        if sums is None:
            sums = states[0].new_zeros(len(states), len(counts), states[0].shape[-1])
        for row, (_, samples, old) in enumerate(chosen):
            for into, state in zip(sums, states, strict=True):
                into.index_add_(0, samples[old:], state[row, old:])
            counts += samples[old:].bincount(minlength=len(counts))
    assert sums is not None  # a recording has words
    return sums / counts.clamp_min(1)[:, None]


def windows(pairs: Sequence[tuple[int, int]], length: int) -> list[tuple[Tensor, Tensor, int]]:
    """Tokens with their samples cut into windows that overlap by half; with each, how many were in the one before."""
    ids, samples = (torch.tensor([pair[part] for pair in pairs], dtype=torch.long) for part in (0, 1))
    length = min(length, len(pairs))
    found, done = [], 0
    while done < len(pairs):
        end = min(len(pairs), max(done + (length + 1) // 2, length))
        start = end - length
        found.append((ids[start:end], samples[start:end], done - start))
        done = end
    return found


def _alike(pieces: list[tuple[Tensor, Tensor, int]]) -> list[list[tuple[Tensor, Tensor, int]]]:
    """Windows of one length together, at most _BATCH of them."""
    batches: list[list[tuple[Tensor, Tensor, int]]] = []
    for piece in pieces:
        if not batches or len(batches[-1]) == _BATCH or len(batches[-1][0][0]) != len(piece[0]):
            batches.append([])
        batches[-1].append(piece)
    return batches


def pace_of(recording: Recording) -> Tensor:
    """Number of words and of letters of each sample (N x 2): what any feature of words knows of, without a model."""
    counts = [(len(words), sum(map(len, words))) for words in recording.words]
    return torch.tensor(counts, dtype=torch.float64)


def kernel_of(features: Tensor, known: Tensor, runs: Tensor, training: Tensor, delays: range) -> Tensor:
    """Inner products (N x N, float64) of the samples' features at these delays, with a mean diagonal of 1.

    Features (N x d) are standardised by the training samples whose features are known (N); the others are 0, and so
    are dimensions that do not vary. The concatenation of delayed features has as its inner products the sum of shifted
    ones, so d x delays columns are never made. Delays stay within a run (runs: N).
    """
    x = features.double()
    seen = x[training[known[training]]]
    if len(seen) < 2:
        raise BadData("fewer than two of the recording's training samples have words")
    deviation = seen.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * seen.abs().amax(0), 1 / deviation.clamp_min(1e-300), 0)
    x = (x - seen.mean(0)) * scale * known[:, None]
    found = delayed(x @ x.T, runs, delays)
    diagonal = found.diagonal()[training].mean()
    return found / diagonal if diagonal > 0 else found


def delayed(gram: Tensor, runs: Tensor, delays: range) -> Tensor:
    """Inner products (N x N) of features at several delays, from those without: sum over delays k of G[i - k, j - k],
    0 before a run begins."""
    found, places = torch.zeros_like(gram), torch.arange(len(runs))
    for delay in delays:
        here = places[delay:][runs[delay:] == runs[: len(runs) - delay]]
        found[here[:, None], here] += gram[(here - delay)[:, None], here - delay]
    return found
