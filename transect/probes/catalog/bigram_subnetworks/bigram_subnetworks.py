"""Bigram subnetworks: the few weights that turn the current token into a bigram prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch

from ....anatomy import Matrix
from ....data import Batches, Specimen, load
from ....data.batches import stacked
from ....data.split import split
from ....errors import BadData, NotApplicable, TransectError
from ....parameters import Range
from ...draw import Drawing, Table, bars, heatmap, lines
from ...registry import probing
from ...result import Quantity, Result
from . import masks as masking
from .lenses import Lenses, lenses
from .predictions import Outcome, bigram_surprisals, correlation, outcome
from .search import Search, search
from .table import BigramTable

FULL, FOUND, LARGEST, RANDOM, WITHOUT, WITHOUT_RANDOM, NONE = KINDS = (
    "the whole model", "subnetwork", "largest weights", "random weights", "all but the subnetwork",
    "all but random weights", "no weights",
)  # fmt: skip
HELD_OUT = 0.25
LENGTH = 128  # tokens of a sequence, as in the paper


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    rows = [
        [name, float(result["kept"][number]), float(result["correlation"][number]), float(result["loss"][number]),
         float(result["distance"][number])]
        for number, name in enumerate(result.label("weights", len(KINDS)))
    ]  # fmt: skip
    states = {name: result["output lens"][number] for number, name in enumerate(result.labels["model"])}
    recall = {name: result["input lens"][number] for number, name in enumerate(result.labels["model"])}
    return [
        Table(
            "What each choice of weights predicts", "On held-out tokens. Share: of the blocks' weights that are kept; "
            "embeddings, norms and biases always are. r: of its surprisals with those of the bigram table. Loss: on "
            "the text. Distance: cross-entropy with the table's predictions. The controls have as many weights of "
            "every matrix as the subnetwork.", ["weights", "share", "r", "loss", "distance"], rows,
        ),
        bars(
            "Agreement with the bigram table", "Correlation of surprisals on held-out tokens.",
            {"r": result["correlation"]}, x=result.labels["weights"], xlabel="", ylabel="r",
        ),
        heatmap(
            "Where the kept weights are", "Share of each matrix's weights that the subnetwork keeps.",
            result["density"], y=result.labels["layer"], x=result.labels["role"], xlabel="matrix", ylabel="layer",
            unit="share",
        ),
        lines(
            "Training of the masks", "Cross-entropy with the bigram table before each step, with soft masks.",
            {"distance": result["training"]}, xlabel="step", ylabel="nats",
        ),
        lines(
            "Where the prediction is already there", "Surprisals that a linear map from each layer to the last one "
            "gives, against the model's own.", states, xlabel="layer", ylabel="r",
        ),
        lines(
            "Where the current token can still be read", "Share of tokens that a linear map back to the embeddings "
            "finds.", recall, xlabel="layer", ylabel="share",
        ),
    ]  # fmt: skip


CAVEATS = (
    "That a subnetwork predicts bigrams does not show that the model itself does so with these weights; that it "
    "needs them is what the loss without them says. A random network has such subnetworks too, by the paper.",
    "The table is counted without smoothing. Held-out pairs that it never saw are left out of r, which says nothing "
    "about them then; a short text leaves out many.",
    "With few steps fewer weights are shut than the price would shut: the share is an upper bound of what is needed.",
)


@probing(
    "bigram-subnetworks",
    title="The weights that predict from the current token",
    paper="arXiv:2504.15471",
    draw=draw,
    trains=True,
)
def bigram_subnetworks(
    specimen: Specimen,
    *,
    price: Annotated[float, Range(0)] = 10.0,
    steps: Annotated[int, Range(1, 1_000_000)] = 100,
    rate: Annotated[float, Range(0, 10, above=True)] = 0.03,
    batch: Annotated[int, Range(1, 4096)] = 4,
    sharp: Annotated[float, Range(1)] = 1000.0,
    start: float = 0.0,
    corpus: str = "",
) -> Result:
    """Find a small part of the weights that alone predicts from the current token as a bigram table does.

    Chang and Bergen 2025. Every weight of the blocks' matrices gets a mask, trained by continuous
    sparsification (see the parametrization of that name) with all weights frozen; embeddings, norms and biases are
    never masked. Lowered is the cross-entropy of P(y | x) with the masked model's prediction at every position, plus
    price times the mean of the masks. P is counted without smoothing on all but the last quarter of the text, on which
    the masks are trained; what is measured is measured on that quarter. The paper trains on 500,000 sequences of 128
    tokens at rate 5e-5 for up to 15,000 steps, at 32 a step, until fewer weights are undecided than a hundredth of
    those kept; rate, steps and the growth of τ are ours, for short trainings. As there a training whose loss jumps is
    repeated with another order of the text, up to three times. Controls have as many weights of every matrix: at
    random, and those of largest magnitude (ours), which thus profit from how the subnetwork spreads over the matrices.

    The masks are stored, as bits, in the result (`masks.unpacked`), and are put on a model by `masks.applied`.

    Costs steps x batch x 128 forward and backward passes of a token, and takes five numbers for each weight.

    price: of the share of the weights, in nats (λ). The paper tries 0 to 1000, and takes 10 for most models.
    steps: of the training of the masks.
    rate: of the masks' numbers.
    batch: sequences of up to 128 tokens in a step.
    sharp: by what the masks' numbers are multiplied in the last step, before the sigmoid.
    start: of the masks' numbers. 0 halves all weights at first, 5 begins near the model.
    corpus: more text of the same kind, as --data takes it, to count the table on in place of the one at hand. Not
        the text of which the last quarter is measured on.
    """
    specimen.require_causal()
    _ = specimen.lens
    matrices = specimen.matrices()
    training, held_out = _parts(specimen, batch)
    model, vocabulary = specimen.model, _vocabulary(specimen)
    table = BigramTable(_counted(specimen, corpus) if corpus else training.texts(), vocabulary)
    if not table.pairs:
        raise NotApplicable("no token of the text has one behind it: it needs longer sequences")
    bigram = bigram_surprisals(model, held_out, table)
    if not bool(bigram.isfinite().any()):
        raise NotApplicable("no pair of held-out tokens was counted: it needs more text (--sequences), or a corpus")

    found = search(specimen, training, table, price=price, steps=steps, rate=rate, sharp=sharp, start=start)
    generator = torch.Generator().manual_seed(specimen.seed)
    random, whole = masking.shuffled(found.masks, generator), masking.uniform(matrices, True)
    chosen = {
        FULL: whole, FOUND: found.masks, LARGEST: masking.largest(found.masks, matrices), RANDOM: random,
        WITHOUT: masking.complement(found.masks), WITHOUT_RANDOM: masking.complement(random),
        NONE: masking.complement(whole),
    }  # fmt: skip
    outcomes, maps = {}, {}
    for name in specimen.shown(KINDS, "masked models"):
        with masking.applied(matrices, chosen[name]):
            outcomes[name] = outcome(model, held_out, table)
            if name in (FULL, FOUND):
                maps[name] = lenses(specimen, training, held_out)
    return _result(matrices, found, chosen, outcomes, maps, bigram, table)


def _parts(specimen: Specimen, batch: int) -> tuple[Batches, Batches]:
    """The text to train on, and the last quarter to measure on, in pieces of 128 tokens."""
    pieces = [piece for row in specimen.text.texts() for piece in row.split(LENGTH) if len(piece) > 1]
    if len(pieces) < 2:
        raise NotApplicable("it needs two pieces of text of at least two tokens: one to train on, one to measure on")
    rows = stacked([{"input_ids": piece} for piece in pieces], batch)
    return split(Batches(rows), HELD_OUT, batch, specimen.seed)


def _vocabulary(specimen: Specimen) -> int:
    """How many tokens count: those of the tokenizer, where the model has further rows for none."""
    rows = len(specimen.lens.weight)
    return min(rows, len(specimen.tokenizer)) if specimen.tokenizer is not None else rows


def _counted(specimen: Specimen, corpus: str) -> list[torch.Tensor]:
    """Sequences of a further text."""
    if specimen.tokenizer is None:
        raise NotApplicable("counting a further text needs the model's tokenizer: pass tokenizer=AutoTokenizer...")
    try:
        return list(load(corpus, specimen.model, specimen.tokenizer).texts())
    except BadData as reason:
        raise TransectError(f"bigram-subnetworks: corpus={corpus!r}: {reason}") from None


def _result(
    matrices: Sequence[Matrix], found: Search, chosen: Mapping[str, masking.Masks], outcomes: Mapping[str, Outcome],
    maps: Mapping[str, Lenses], bigram: torch.Tensor, table: BigramTable,
) -> Result:  # fmt: skip
    layers = sorted({one.block.index for one in matrices})
    roles = list(dict.fromkeys(one.role for one in matrices))
    sums = torch.zeros(2, len(layers), len(roles), dtype=torch.float64)
    for one in matrices:
        mask, place = found.masks[one.name], (layers.index(one.block.index), roles.index(one.role))
        sums[0][place] += int(mask.sum())
        sums[1][place] += mask.numel()
    correlations = [correlation(outcomes[name].surprisals, bigram) for name in KINDS]
    possible = bigram.isfinite()
    names = [one.name for one in matrices]

    def each(values: Sequence[float], unit: str, about: str) -> Quantity:
        return Quantity(torch.tensor(values, dtype=torch.float64), ("weights",), unit, about)

    def by_state(what: str, unit: str, about: str) -> Quantity:
        return Quantity(torch.stack([getattr(one, what) for one in maps.values()]), ("model", "state"), unit, about)

    quantities = {
        "kept": each([masking.density(chosen[name]) for name in KINDS], "share", "weights of the blocks that are kept"),
        "correlation": each(correlations, "", "Pearson's r of surprisals with the bigram table's, held out"),
        "loss": each([outcomes[name].loss for name in KINDS], "nats", "mean surprisal of held-out tokens"),
        "distance": each([outcomes[name].distance for name in KINDS], "nats", "cross-entropy with the table, held out"),
        "weights": Quantity(torch.tensor(masking.count(found.masks)), (), "weights", "kept by the subnetwork"),
        "density": Quantity(sums[0] / sums[1], ("layer", "role"), "share", "weights of a matrix that are kept"),
        "training": Quantity(torch.tensor(found.losses), ("step",), "nats", "cross-entropy with the table by step"),
        "undecided": Quantity(torch.tensor(found.undecided), (), "", "weights between shut and open, over kept ones"),
        "attempts": Quantity(torch.tensor(found.attempts), (), "", "trainings until one was stable, at most 3"),
        "stable": Quantity(torch.tensor(found.stable), (), "", "whether the last one was"),
        "bigram loss": Quantity(bigram[possible].mean(), (), "nats", "of the table, on pairs that it has seen"),
        "seen": Quantity(possible.double().mean(), (), "share", "held-out pairs that the table has seen"),
        "pairs": Quantity(torch.tensor(table.pairs), (), "pairs", "counted for the table"),
        "output lens": by_state("output", "", "r of surprisals by a linear map to the last state with the model's own"),
        "input lens": by_state("recall", "share", "tokens that a linear map to the embeddings finds"),
        "rotation": by_state("rotation", "radians", "median angle of the linear map to the last state"),
        "masks": Quantity(
            masking.packed(found.masks, names), ("byte",), "", "the subnetwork, 8 weights a byte; see masks.unpacked"
        ),
    }  # fmt: skip
    labels = {
        "weights": KINDS, "model": list(maps), "layer": [str(layer) for layer in layers], "role": roles,
        "matrix": names,
    }  # fmt: skip
    result = Result(quantities, caveats=CAVEATS, labels=labels)
    result.findings = findings(result)
    return result


def jump(curve: torch.Tensor) -> float:
    """How much of what the output lens gains over all layers (L + 1) it gains in the first."""
    return float((curve[1] - curve[0]) / (curve[-1] - curve[0])) if curve[-1] != curve[0] else 0.0


def findings(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    kept, r, loss = (dict(zip(KINDS, result[name].tolist(), strict=True)) for name in ("kept", "correlation", "loss"))
    number, density = int(result["weights"]), result["density"]
    if not 0 < kept[FOUND] < 1:
        told = "none of the weights" if not number else "all of the weights"
        lesson = "a lower price keeps some" if not number else "a higher price, or more steps, shuts some"
        return [f"The subnetwork keeps {told}, so that there is nothing to compare: {lesson}."]
    place = int(density.nan_to_num(-1).argmax())
    layer, role = divmod(place, density.shape[1])
    jumps = [jump(row) for row in result["output lens"]]
    told = [
        f"{number:,} weights of the blocks ({kept[FOUND]:.2%}), with embeddings, norms and biases, predict as the "
        f"bigram table does with r = {r[FOUND]:.3f} (held-out surprisals). The whole model has {r[FULL]:.3f}, as many "
        f"of the largest weights {r[LARGEST]:.3f}, as many random ones {r[RANDOM]:.3f}, no weights at all "
        f"{r[NONE]:.3f}.",
        f"Without them the loss goes from {loss[FULL]:.3f} to {loss[WITHOUT]:.3f} nats, without as many random weights "
        f"to {loss[WITHOUT_RANDOM]:.3f}. The subnetwork alone has {loss[FOUND]:.3f}.",
        f"Densest is {result.labels['role'][role]} of layer {result.labels['layer'][layer]} with "
        f"{float(density.flatten()[place]):.2%}.",
        f"A linear map to the last state recovers {jumps[0]:.0%} of what there is to gain in r behind the first block "
        f"of the whole model, and {jumps[1]:.0%} in the subnetwork.",
    ]
    if not bool(result["stable"]):
        told.append("The training of the masks was not stable in any of 3 attempts: its last one is shown.")
    if float(result["undecided"]) > 0.01:
        told.append(
            f"{float(result['undecided']):.1%} as many weights as are kept were still undecided at the end (the paper "
            "stops below 1 %): more steps, or a larger rate, decide them."
        )
    return told
