"""Claims about sparse features of attention outputs (Kissane et al. 2024, arXiv:2406.17759)."""

from __future__ import annotations

from ...data import Specimen
from ...data.batches import evenly_spaced
from ...probes import Result as Found
from ...probes.catalog.attention_sae.dictionaries import chosen_layers
from ..context import Context
from ..probing import probed
from ..registry import NotApplicable, Result, Verdict, claim

WEIGHTS = (1.0, 2.0, 4.0, 8.0)  # of the sum of activations
TOKENS = 200_000  # trained on
RECOVERED, FEW = 0.8, 0.25  # of the loss that zeros cost; active features of a token, of D
MATTERS = 0.01  # nats that zeros cost at least, or there is nothing to recover
POLYSEMANTIC = 0.9  # of the heads
LEAST = 5  # features of a head that have a source, or it is not judged
MOST = 8  # layers whose heads are judged: a dictionary is trained for each


@claim(
    "attention-sae/sparse-and-faithful",
    method="attention-sae",
    paper="arXiv:2406.17759",
    statement="A few sparse features stand for a layer's attention outputs: with far fewer of them active than the "
    "outputs have numbers, most of the loss is recovered, and more than by as many principal directions.",
)
def sparse_and_faithful(context: Context) -> Result:
    """The middle layer, on held-out calibration text, at four weights of the sum of activations.

    It holds if at one of them at least 0.8 of the loss that zeros cost is recovered with at most a quarter as many
    active features as the heads' outputs have numbers, and at every weight more than by that number of principal
    directions. The thresholds are ours. Not applicable where zeros cost less than 0.01 nats.
    """
    rows = []
    for weight in WEIGHTS:
        found, width = _found(context, weight), _width(context)
        clean, zeros, made, directions = found["loss"][0].tolist()
        if zeros - clean < MATTERS:
            raise NotApplicable(f"without this layer's attention the loss rises by {zeros - clean:.4f} nats alone")
        rows.append({
            "l1": weight, "active": round(float(found["l0"][0]), 2), "of": width, "loss": round(clean, 4),
            "zeros": round(zeros, 4), "dictionary": round(made, 4), "directions": round(directions, 4),
            "recovered": round(float(found["recovered"][0, 0]), 4), "by directions":
            round(float(found["recovered"][0, 1]), 4), "dead": round(float(found["dead"][0]), 4),
        })  # fmt: skip
    enough = [row for row in rows if row["recovered"] >= RECOVERED and row["active"] <= FEW * row["of"]]
    better = [row for row in rows if row["recovered"] > row["by directions"]]
    best = max(rows, key=lambda row: (row in enough, row["recovered"]))
    told = (
        f"With {best['active']} active features of {best['of']} numbers {best['recovered']:.0%} of the loss is "
        f"recovered, {best['by directions']:.0%} by principal directions; the dictionary is better at {len(better)} of "
        f"{len(rows)} weights, and {len(enough)} of them recover {RECOVERED:.0%} with at most {FEW:.0%} active. Its "
        f"training goes {float(found['rounds'][0]):.1f} times through the text."
    )
    holds = bool(enough) and len(better) == len(rows)
    return Result(Verdict.of(holds), told, rows)


@claim(
    "attention-sae/polysemantic-heads",
    method="attention-sae",
    paper="arXiv:2406.17759",
    statement="At least 90 percent of the heads are polysemantic: the features that lie most in a head do unrelated "
    "things.",
)
def polysemantic_heads(context: Context) -> Result:
    """In place of the authors' eyes: the ten features with the largest share in a head, by what they are read from.

    Where such a feature is strongest, the token that contributes most is the token itself, the one before, one near by,
    the first, one far back, or what came behind an earlier copy. A head whose features are of two kinds or more counts
    as polysemantic; two features of one kind may still do unrelated things, so this is a lower bound. All layers with
    attention, or eight of them at even distances; a head of which fewer than five features have a source is not judged.
    """
    layers = evenly_spaced(chosen_layers(context.specimen, "all"), MOST)
    found = _found(context, 2.0, ",".join(map(str, layers)))
    if "kinds" not in found.quantities:
        raise NotApplicable("attention weights times values do not add up to what this model's heads put out")
    rows, several, judged = [], 0, 0
    for i, layer in enumerate(found.labels["layer"]):
        kinds = found["kinds"][i]
        able = kinds.sum(1) >= LEAST
        many = (kinds > 0).sum(1) >= 2
        several, judged = several + int((able & many).sum()), judged + int(able.sum())
        most = kinds.amax(1)[able] / kinds.sum(1)[able]
        rows.append({
            "layer": layer, "heads": int(able.sum()), "polysemantic": int((able & many).sum()),
            "largest kind": round(float(most.mean()), 3) if len(most) else None,
        })  # fmt: skip
    if not judged:
        raise NotApplicable(f"no head has {LEAST} features that are active on this text")
    share = several / judged
    told = f"{several} of {judged} heads ({share:.0%}) have features of at least two kinds among their top ten."
    return Result(Verdict.of(share >= POLYSEMANTIC), told, rows)


def _found(context: Context, weight: float, layers: str = "middle") -> Found:
    """What the probe finds; both claims share the dictionaries that they have in common."""
    specimen: Specimen = context.specimen
    known = context.shared.setdefault("attention-sae", {})
    if (weight, layers) not in known:
        known[weight, layers] = probed(
            specimen, "attention-sae", l1=weight, layers=layers, tokens=TOKENS, shown=1
        )  # fmt: skip
    return known[weight, layers]


def _width(context: Context) -> int:
    """D of the middle layer, as the probe chooses it."""
    layers = chosen_layers(context.specimen, "all")
    return context.anatomy.blocks[layers[len(layers) // 2]].find("o").shape[1]
