"""Amplitudes at the rates of sentences and phrases, and which neurons are tagged by them.

Shapes: T samples, n neurons of a layer, R rates, G groups of shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....forward import run_body, to_device, watch
from ...places import wide
from .rhythm import Order, Stimuli, orders

GROUPS = 10
LEVEL = 0.05  # of the permutation test, and of false discoveries
THRESHOLD = 2.0  # of z
NEIGHBOURS = 4  # frequencies on either side of a peak
KINDS = ("sentence", "phrase", "both")
_BATCH = 4  # sequences
_ENTRIES = 2**24  # numbers of the permutations' transforms in memory at once


@dataclass(frozen=True)
class Recorded:
    """Activations in one condition, by layer.

    layers: their numbers. means: mean over all shuffles (T x n). amplitudes: of each group's mean at the rates (G x R x
    n). power: share of the power at each frequency, mean over groups and neurons (layers x (T / 2 + 1)).
    """

    layers: list[int]
    means: list[Tensor]
    amplitudes: list[Tensor]
    power: Tensor


@dataclass(frozen=True)
class Tagging:
    """What was found of every neuron, layers x n; NaN, and -1 for a kind, where a layer has fewer than n neurons.

    passed: permutation test of the sentence and of any phrase rate (2 x ...). values: contrast of the amplitudes, 0
    where the test is not passed, and z of it. p: larger p value of both tests (2 x ...). kinds: place in KINDS + 1 of
    the paper's verdict, 0 for none. corrected: the same at a rate of false discoveries of LEVEL. peaks: amplitude at
    each rate over the mean of its neighbours (R x ...).
    """

    passed: Tensor
    values: Tensor
    z: Tensor
    p: Tensor
    kinds: Tensor
    corrected: Tensor
    peaks: Tensor

    def counts(self, corrected: bool = False) -> Tensor:
        """Neurons of each kind (layers x KINDS)."""
        kinds = self.corrected if corrected else self.kinds
        return torch.stack([(kinds == number + 1).sum(1) for number in range(len(KINDS))], 1)


def spectrum(signals: Tensor) -> Tensor:
    """|rfft| over the samples of ... x T x n, with 0 for the mean (... x (T / 2 + 1) x n)."""
    found = torch.fft.rfft(signals, dim=-2).abs()
    found[..., 0, :] = 0
    return found


@torch.no_grad()
def record(specimen: Specimen, stimuli: Stimuli, kind: Order, shuffles: int, seed: int) -> Recorded:
    """Read the stimuli in so many random orders, in GROUPS groups; one token a unit, or the mean over its tokens."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [block.index for block in specimen.anatomy.blocks if block.mlp is not None]
    totals: dict[int, Tensor] = {}
    amplitudes: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    powers: list[Tensor] = []
    each = shuffles // GROUPS
    for _ in specimen.shown(range(GROUPS), f"hftp, {kind}"):
        sums = _group(specimen, stimuli, orders(stimuli, kind, each, generator), wanted)
        if not sums:
            raise NotApplicable("no block of this model has MLP neurons: they were dropped, or parts stand there")
        power = []
        for layer, total in sums.items():
            found = spectrum(total / each)
            amplitudes[layer].append(found[stimuli.bins])
            squares = found.square()
            power.append((squares / squares.sum(0).clamp_min(torch.finfo(found.dtype).tiny)).mean(1))
            totals[layer] = totals[layer] + total if layer in totals else total
        powers.append(torch.stack(power))
    return Recorded(
        list(totals), [total / (each * GROUPS) for total in totals.values()],
        [torch.stack(amplitudes[layer]) for layer in totals], torch.stack(powers).mean(0),
    )  # fmt: skip


def _group(specimen: Specimen, stimuli: Stimuli, chosen: Sequence[Tensor], layers: list[int]) -> dict[int, Tensor]:
    """Sum over sequences of the neurons' activations for every unit that counts (T x n), by layer, on the CPU."""
    sums: dict[int, Tensor] = {}
    for start in range(0, len(chosen), _BATCH):
        read = [stimuli.read(order) for order in chosen[start : start + _BATCH]]
        ids = torch.stack([ids for ids, _ in read])
        with watch(specimen.anatomy, ["neurons"], layers) as seen:
            run_body(specimen.model, to_device({"input_ids": ids}, specimen.model.device))
        for layer, found in seen.neurons.items():
            found = wide(found.reshape(*ids.shape, found.shape[-1])).cpu()
            units = [by_unit(one, owners, len(stimuli.units)) for one, (_, owners) in zip(found, read, strict=True)]
            total = torch.stack(units).sum(0)[stimuli.skip * stimuli.size :]
            sums[layer] = sums[layer] + total if layer in sums else total
    return sums


def by_unit(activations: Tensor, owners: Tensor, units: int) -> Tensor:
    """Mean over each unit's tokens (units x n). activations: tokens x n. owners: unit of each token."""
    if len(owners) == units:
        return activations
    sums = activations.new_zeros(units, activations.shape[1]).index_add_(0, owners, activations)
    return sums / owners.bincount(minlength=units)[:, None]


def exceedance(signals: Tensor, bins: Sequence[int], permutations: int, seed: int) -> Tensor:
    """Share of random permutations in time with at least the amplitude of the signals (T x n) at each bin (R x n).

    Each signal is centred and scaled first, so neither an offset nor its size matters; 1 for a constant one. Only the
    wanted frequencies of a permuted signal are computed: two real products with permuted cosines and sines.
    """
    signals = wide(signals)
    size = signals.abs().amax(0)
    centred = signals - signals.mean(0)
    length = centred.norm(dim=0)
    flat = length <= 1e-5 * size * len(signals) ** 0.5
    scaled = centred / length.clamp_min(torch.finfo(signals.dtype).tiny)
    count = len(signals)
    own = spectrum(scaled)[list(bins)].square()
    angles = 2 * torch.pi * torch.tensor(bins, dtype=torch.float64)[:, None] * torch.arange(count) / count  # R x T
    waves = torch.stack([angles.cos(), angles.sin()]).to(signals)
    generator, found = torch.Generator().manual_seed(seed), torch.zeros_like(own)
    step = max(1, _ENTRIES // (2 * len(bins) * signals.shape[1]))
    for start in range(0, permutations, step):
        chunk = range(start, min(start + step, permutations))
        orders = torch.stack([torch.randperm(count, generator=generator) for _ in chunk])
        null = (waves[:, :, orders] @ scaled).square().sum(0)  # R x chunk x n
        found += (null >= own[:, None] * (1 - 1e-6)).sum(1)
    return torch.where(flat, 1.0, found / permutations)


def contrast_p(experiment: Tensor, control: Tensor) -> Tensor:
    """One-sided p values (R x n) of Welch's t test that amplitudes (G x R x n) are larger in the experiment."""
    from scipy.stats import ttest_ind

    with np.errstate(all="ignore"):
        _, p = ttest_ind(experiment.double().numpy(), control.double().numpy(), equal_var=False, alternative="greater")
    return torch.from_numpy(np.asarray(p)).nan_to_num(1.0)


def peaks_of(found: Tensor, bins: Sequence[int]) -> Tensor:
    """Amplitude at each bin over the mean of up to NEIGHBOURS on either side (R x n). found: a spectrum, as above."""
    ratios = []
    for place in bins:
        near = [n for n in range(max(1, place - NEIGHBOURS), min(len(found), place + NEIGHBOURS + 1)) if n not in bins]
        around = found[near].mean(0) if near else torch.zeros_like(found[0])
        ratios.append(torch.where(around > 0, found[place] / around.clamp_min(torch.finfo(found.dtype).tiny), 0))
    return torch.stack(ratios)


def tag(experiment: Recorded, control: Recorded, bins: Sequence[int], permutations: int, seed: int) -> Tagging:
    """Which neurons follow the rhythm of the experiment, more than in the control. bins: of sentences, then phrases."""
    widths = [mean.shape[1] for mean in experiment.means]
    rows = []
    for mean, one, other in zip(experiment.means, experiment.amplitudes, control.amplitudes, strict=True):
        share = exceedance(mean, bins, permutations, seed)
        difference = one.mean(0) - other.mean(0)
        joint = torch.maximum((share.double() * permutations + 1) / (permutations + 1), contrast_p(one, other))
        phrases = len(bins) - 1
        passed = torch.stack([share[0] < LEVEL, (share[1:] < LEVEL).any(0)])
        values = torch.stack([difference[0], difference[1:].amax(0)]).clamp_min(0) * passed
        p = torch.stack([joint[0], (joint[1:].amin(0) * phrases).clamp_max(1)])
        rows.append((passed.float(), values.float(), p, peaks_of(spectrum(mean), bins)))
    passed, values, p, peaks = (_padded([row[part] for row in rows], max(widths)) for part in range(4))
    z = torch.stack([standard_scores(rate) for rate in values])
    real = values[0].isfinite()
    rejected = torch.stack([discoveries(rate) for rate in p])
    return Tagging(passed, values, z, p, _kinds(z > THRESHOLD, real), _kinds(rejected, real), peaks)


def standard_scores(values: Tensor) -> Tensor:
    """(x - mean) / deviation over all finite entries, zeros included; 0 where nothing varies."""
    real = values[values.isfinite()].double()
    deviation = real.std(correction=0)
    return torch.zeros_like(values) if deviation == 0 else ((values - real.mean()) / deviation).float()


def discoveries(p: Tensor) -> Tensor:
    """Where the null is rejected at a rate of false discoveries of LEVEL, by Benjamini and Hochberg; NaN is no test."""
    from scipy.stats import false_discovery_control

    real = p.isfinite()
    adjusted = torch.ones_like(p)
    adjusted[real] = torch.from_numpy(np.asarray(false_discovery_control(p[real].numpy())))
    return adjusted < LEVEL


def _kinds(found: Tensor, real: Tensor) -> Tensor:
    """1 for sentence alone, 2 for phrase alone, 3 for both, else 0; -1 where there is no neuron."""
    return (found[0].int() + 2 * found[1].int()).masked_fill(~real, -1)


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """Of R x n each, one layer's, R x layers x width."""
    whole = rows[0].new_full((len(rows[0]), len(rows), width), torch.nan)
    for number, row in enumerate(rows):
        whole[:, number, : row.shape[1]] = row
    return whole
