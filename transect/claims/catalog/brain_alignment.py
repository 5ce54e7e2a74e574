"""Claims of encoding models by banded ridge (Oota et al. 2025, arXiv:2506.08277), on recordings that are made up.

The paper's results are about people who watch films. What can be checked here is that the method finds what was planted
in a recording: channels that mix the features of one of two layers, with a kernel over five samples and noise, in four
repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...data import Specimen
from ...probes.catalog.brain_alignment.banded import candidates_for, contributions, correlations, fit
from ...probes.catalog.brain_alignment.ceiling import LEAST, from_repeats
from ...probes.catalog.brain_alignment.features import features_of, kernel_of
from ...probes.catalog.brain_alignment.recordings import Recording
from ...probes.catalog.brain_alignment.significance import block_p
from ..context import Context
from ..probing import untrained
from ..registry import NotApplicable, Result, Verdict, claim

PAPER = "arXiv:2506.08277"
SAMPLES, WORDS = 600, 3  # at most, and words of each; LEAST_SAMPLES at least
LEAST_SAMPLES = 60
CHANNELS, REPEATS, RATIO = 300, 4, 0.5  # RATIO: of signal to noise, in variance, of one repeat
RESPONSE = (0.2, 0.8, 1.0, 0.6, 0.2)  # of a channel, 1 to 5 samples after a word
DIRECTIONS = 8  # of a layer's features that a channel mixes: principal components
HELD_OUT, CONTEXT, PERMUTATIONS, SEED = 0.25, 128, 1000, 0
DELAYS = range(1, 6)


@dataclass(frozen=True)
class Planted:
    """A made-up recording: signal (N x V), responses with noise, and which of the two layers each channel mixes (V)."""

    recording: Recording
    signal: Tensor
    source: Tensor
    layers: tuple[int, int]
    features: Tensor

    def split(self) -> tuple[Tensor, Tensor]:
        """Samples to train on, and the end, held out, with a gap of the longest delay."""
        samples = torch.arange(len(self.signal))
        first = len(samples) - round(HELD_OUT * len(samples))
        return samples[: first - max(DELAYS)], samples[first:]


def plant(specimen: Specimen, seed: int = SEED) -> Planted:
    """Words of the text, at most WORDS a sample, and responses to a layer at a quarter and one at three quarters."""
    words = [word for row in specimen.text.texts() for word in specimen.decode(row).split()][: SAMPLES * WORDS]
    each = max(1, min(WORDS, len(words) // LEAST_SAMPLES))
    samples = len(words) // each
    if samples < LEAST_SAMPLES:
        raise NotApplicable(f"it needs a text of {LEAST_SAMPLES} words, and there are {len(words)}")
    cut = [words[each * n : each * (n + 1)] for n in range(samples)]
    blank = torch.arange(samples, dtype=torch.float64)[None, :, None]
    read = Recording(blank, cut, torch.zeros(samples).long())
    features = features_of(specimen, read, CONTEXT)
    layers = (max(1, specimen.layers // 4), max(2, 3 * specimen.layers // 4))
    if specimen.layers < 2:
        raise NotApplicable("it needs a model of two layers at least")
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(CHANNELS) % 2
    signal = torch.zeros(samples, CHANNELS, dtype=torch.float64)
    for number, layer in enumerate(layers):
        mixed = _directions(features[layer]) @ torch.randn(
            DIRECTIONS, CHANNELS, generator=generator, dtype=torch.float64
        )  # fmt: skip
        late = sum(size * _later(mixed, delay) for delay, size in zip(DELAYS, RESPONSE, strict=True))
        assert isinstance(late, Tensor)
        signal[:, source == number] = late[:, source == number]
    signal = (signal - signal.mean(0)) / signal.std(0).clamp_min(1e-12)
    noise = torch.randn(REPEATS, samples, CHANNELS, generator=generator, dtype=torch.float64) / RATIO**0.5
    return Planted(replace(read, responses=signal + noise, names=()), signal, source, layers, features)


def _directions(features: Tensor) -> Tensor:
    """The first principal components of standardised features (N x DIRECTIONS), each of variance 1."""
    x = features.double()
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-9)
    u = torch.linalg.svd(x, full_matrices=False).U[:, :DIRECTIONS]
    return torch.nn.functional.pad(u, (0, DIRECTIONS - u.shape[1])) * len(x) ** 0.5


def _later(x: Tensor, delay: int) -> Tensor:
    return torch.cat([torch.zeros_like(x[:delay]), x[: len(x) - delay]])


@claim(
    "brain-alignment/planted",
    method="brain-alignment",
    paper=PAPER,
    statement="Banded ridge tells for 90 % of the channels of a made-up recording which of two layers they mix, and "
    "their correlation, over the ceiling from repeats, is near 1; channels of noise are not predicted.",
)
def planted(context: Context) -> Result:
    """The card's experiment, ours: 300 channels, four repeats, a ratio of signal to noise of 0.5.

    It holds where 90 % of the channels get the right one of the two layers, by which alone predicts blocks of the
    training samples better and, together, by which explains more of the variance held out; the median of r over the
    ceiling is from 0.9 to 1.1; and as many channels of noise have an r of 0 on average within three standard errors
    and fewer than 10 % p values below 0.05.
    """
    made = plant(context.specimen)
    training, held_out = made.split()
    kernels = _kernels(made, made.features, training)
    target = made.recording.responses.mean(0)
    gap, one = max(DELAYS), candidates_for(1, 0, 0)
    alone = [fit(kernel[None], target, training, held_out, candidates=one, gap=gap) for kernel in kernels]
    scores = torch.stack([found.validation for found in alone])
    together = fit(kernels, target, training, held_out, candidates=candidates_for(2, 20, SEED), gap=gap)
    parts = contributions(together.parts, target[held_out])
    ceiling = from_repeats(made.recording.responses)
    r = correlations(together.predicted, target[held_out])
    normalised = (r / ceiling.clamp_min(LEAST))[ceiling >= LEAST]
    generator = torch.Generator().manual_seed(SEED + 1)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    missed = fit(kernels, noise, training, held_out, candidates=candidates_for(2, 20, SEED), gap=gap)
    chance = correlations(missed.predicted, noise[held_out])
    false = float((block_p(missed.predicted, noise[held_out], PERMUTATIONS, SEED) < 0.05).double().mean())
    by_score, by_part = (float((x.argmax(0) == made.source).double().mean()) for x in (scores, parts))
    error = float(chance.std() / len(chance) ** 0.5)
    middle = float(normalised.median()) if len(normalised) else 0.0
    known = float(correlations(made.signal[held_out], target[held_out]).mean())
    holds = by_score >= 0.9 and by_part >= 0.9 and 0.9 <= middle <= 1.1
    holds &= abs(float(chance.mean())) <= 3 * error and false < 0.1
    rows = [
        {
            "layer": layer, "channels": int((made.source == number).sum()),
            "right by blocks": float((scores.argmax(0) == number)[made.source == number].double().mean()),
            "right by R²": float((parts.argmax(0) == number)[made.source == number].double().mean()),
            "r": float(r[made.source == number].mean()), "ceiling": float(ceiling[made.source == number].mean()),
            "r, other layer alone": float(
                correlations(alone[1 - number].predicted, target[held_out])[made.source == number].mean()
            ),
        }
        for number, layer in enumerate(made.layers)
    ]  # fmt: skip
    return Result(
        Verdict.of(holds),
        f"Of {CHANNELS} channels that mix layer {made.layers[0]} or {made.layers[1]}, {by_score:.1%} get the right one "
        f"by blocks of the training samples and {by_part:.1%} by R² held out. r is {float(r.mean()):.3f} on average, "
        f"that of the signal itself {known:.3f}, the ceiling {float(ceiling.mean()):.3f}; r over the ceiling is "
        f"{middle:.3f} in the median. As many channels of noise get r = {float(chance.mean()):+.4f} ± {error:.4f}, and "
        f"{false:.1%} of them p below 0.05. {len(training)} samples to train on, {len(held_out)} held out.",
        rows,
    )


@claim(
    "brain-alignment/untrained",
    method="brain-alignment",
    paper=PAPER,
    statement="A recording made of a trained model's layers is predicted better by these than by the same layers of an "
    "untrained copy.",
)
def trained_features(context: Context) -> Result:
    """The same made-up recording and the same number of features; it holds where the trained layer's r is larger in the
    mean over channels of each of the two layers, by two standard errors over channels.

    Channels are of the trained model, so this is about the method, not about brains: features of equal number with the
    same words behind them must not do as well.
    """
    made = plant(context.specimen)
    training, held_out = made.split()
    target = made.recording.responses.mean(0)
    fresh = features_of(untrained(context.specimen), made.recording, CONTEXT)
    rows, holds = [], True
    both = [
        _alone(_kernels(made, features, training), target, training, held_out) for features in (made.features, fresh)
    ]
    ceiling = from_repeats(made.recording.responses)
    for number, layer in enumerate(made.layers):
        chosen = made.source == number
        mine, other = (one[number, chosen] for one in both)
        gain = mine - other
        error = float(gain.std() / len(gain) ** 0.5)
        holds &= float(gain.mean()) > 2 * error
        rows.append(
            {"layer": layer, "trained": float(mine.mean()), "untrained": float(other.mean()),
             "difference": float(gain.mean()), "standard error": error,
             "trained, over the ceiling": float((mine / ceiling[chosen].clamp_min(LEAST)).median()),
             "untrained, over the ceiling": float((other / ceiling[chosen].clamp_min(LEAST)).median())}
        )  # fmt: skip
    listed = "; ".join(
        f"layer {row['layer']}: r = {row['trained']:.3f} against {row['untrained']:.3f} "
        f"({row['difference']:+.3f} ± {row['standard error']:.3f})"
        for row in rows
    )
    return Result(
        Verdict.of(holds),
        f"Trained against untrained, on {len(held_out)} samples held out: {listed}.",
        rows,
    )


def _kernels(made: Planted, features: Tensor, training: Tensor) -> Tensor:
    heard = torch.ones(len(made.signal), dtype=torch.bool)
    runs = made.recording.runs
    return torch.stack([kernel_of(features[layer], heard, runs, training, DELAYS) for layer in made.layers])


def _alone(kernels: Tensor, target: Tensor, training: Tensor, held_out: Tensor) -> Tensor:
    """r of each layer alone (2 x V)."""
    one = candidates_for(1, 0, 0)
    made = [fit(kernel[None], target, training, held_out, candidates=one, gap=max(DELAYS)) for kernel in kernels]
    return torch.stack([correlations(found.predicted, target[held_out]) for found in made])
