"""Claims of the study of latent languages (Zhong et al. 2024, arXiv:2408.10811)."""

from __future__ import annotations

from typing import Any

import torch

from ....anatomy import Anatomy
from ....data import Specimen
from ....data.concepts import load_concepts
from ....errors import BadData
from ....forward import watch
from ....probes.catalog.latent_language.language_dimensions import SWAPS, dimensions_of
from ....probes.catalog.latent_language.languages import Asked, Lexicon, by_language, middle, tokenised
from ...context import Context
from ...registry import NotApplicable, Result, Verdict, claim
from .bilingual import LANGUAGES, MEANINGS, OFFSETS, SMALL, STEPS, bilingual, questions

PAPER = "arXiv:2408.10811"
SHARES = (0.05, 0.1, 0.25, 0.5)  # of the dimensions that are swapped; the first decides
CHANGE = 0.05  # probability that counts as a change, our choice
MIXES, SEED = (0.9, 0.5), 0  # of language A in the running text


@claim(
    "latent-language/dimensions",
    method="latent-language",
    paper=PAPER,
    statement="Few dimensions carry the language: swapping the top 5 % of them changes the answer's language more "
    "than its meaning, and as many random dimensions change neither.",
)
def dimensions(context: Context) -> Result:
    """Swaps between the two languages of the bundled model, means over the middle half of the layers.

    Change of language: what the word of the other language gains. Change of meaning: what the word loses over all
    languages. A change is one of 0.05 or more (ours). Larger shares are reported and do not decide.
    """
    specimen = context.specimen
    lexicon = bundled_concepts(specimen)
    rows = []
    for share in SHARES:
        found = dimensions_of(specimen, specimen.lens, lexicon, share)
        assert found is not None  # the bundled concepts are asked in both languages
        layers = middle(found.answers.shape[1])
        mean = found.answers[:, layers.start : layers.stop].mean(1)
        for name, after in list(zip(SWAPS, mean, strict=True))[1 : None if share == SHARES[0] else 3]:
            rows.append(
                {
                    "share": share, "swapped": name, "language": float(after[1] - mean[0, 1]),
                    "meaning": float(mean[0, 2] - after[2]), "asked for": float(after[0]), "other": float(after[1]),
                }
            )  # fmt: skip
    top, random = rows[0], rows[1]
    holds = top["language"] >= CHANGE and top["language"] > abs(top["meaning"])
    holds &= max(abs(random["language"]), abs(random["meaning"])) < CHANGE
    enough = [f"{row['share']:.0%}" for row in rows if row["swapped"] == SWAPS[1] and row["language"] >= CHANGE]
    return Result(
        Verdict.of(holds),
        f"Swapping the top {SHARES[0]:.0%} gives the other language's word {top['language']:+.4f} of probability "
        f"and takes {top['meaning']:+.4f} from the word in any language; as many random ones "
        f"{random['language']:+.4f} and {random['meaning']:+.4f}; all dimensions {rows[2]['language']:+.4f} and "
        f"{rows[2]['meaning']:+.4f}. Shares whose top dimensions change the language by {CHANGE} or more: "
        f"{', '.join(enough) or 'none'} of {', '.join(f'{share:.0%}' for share in SHARES)}.",
        rows,
    )


def bundled_concepts(specimen: Specimen) -> Lexicon:
    """The bundled model's concepts; not applicable to a model that does not know their words or their answers."""
    reason = (
        "it asks for concepts of the bundled model, and this one does not know {}; measure your own with transect "
        "inspect --probes latent-language --latent-language.concepts FILE"
    )
    if specimen.tokenizer is None:
        raise NotApplicable(reason.format("them: it has no tokenizer here"))
    try:
        lexicon = tokenised(specimen, load_concepts("organism"))
    except BadData:
        raise NotApplicable(reason.format("their words")) from None
    final = by_language(specimen, specimen.lens, lexicon)[0][:, -1]
    right = float((final[torch.arange(len(final)), lexicon.targets] > 0.5).double().mean())
    if right < 0.5:
        raise NotApplicable(reason.format(f"more than {right:.0%} of their answers"))
    return lexicon


@claim(
    "latent-language/dominant",
    method="latent-language",
    paper=PAPER,
    statement="A model that reads mostly one language finds an answer's meaning before the target language "
    "overtakes, passes through its dominant language on the way to the other, and less so after a balanced text.",
)
def dominant(context: Context) -> Result:
    """Two small models that the claim trains, with 90 % and with 50 % of language A (see `bilingual`).

    They translate from C to B. Judged on the middle half of the layers: in the first model A has more probability
    than B, and the gap P(A) - P(B) over P(A) + P(B) shrinks in the second. The right meaning is the most probable
    one, summed over languages, for half of the prompts at an earlier layer than the one from which on B stays above
    A. These readings are ours. Not applicable where a model did not learn to translate. Repetition of B and
    translation from B to C are reported with their share of right answers and do not decide. The model under study
    is not looked at.
    """
    rows, found = [], []
    for share in MIXES:
        model = bilingual(share, SEED)
        specimen = Specimen(Anatomy(model))
        found.append(translated(specimen, "C", "B"))
        for source, target in (("C", "B"), ("B", "B"), ("B", "C")):
            one = found[-1] if source == "C" else translated(specimen, source, target)
            task = {"share of A": share, "task": f"{source} to {target}", "right": one["right"]}
            rows += [task | layer for layer in one["layers"]]
    unequal, equal = found
    if min(unequal["right"], equal["right"]) < 0.8:
        raise NotApplicable(
            f"the models did not learn to translate in {STEPS} steps: {unequal['right']:.0%} and "
            f"{equal['right']:.0%} of the answers are right"
        )
    before = unequal["meaning"] < unequal["overtakes"]
    passes, shrinks = unequal["gap"] > 0, equal["gap"] < unequal["gap"]
    return Result(
        Verdict.of(before and passes and shrinks),
        f"From C to B after {MIXES[0]:.0%} of A in the running text: the meaning is right from layer "
        f"{unequal['meaning']} on, B stays above A from layer {unequal['overtakes']} on, and the gap between A and B "
        f"in the middle layers is {unequal['gap']:+.3f} of their probability; after {MIXES[1]:.0%} of A "
        f"{equal['gap']:+.3f}. Right answers: {unequal['right']:.0%} and {equal['right']:.0%}. This is about small "
        "models that the claim trains, not about the model under study; their word lists prefer no language.",
        rows,
    )


@torch.no_grad()
def translated(specimen: Specimen, source: str, target: str) -> dict[str, Any]:
    """What the layers say where a translation is predicted.

    right: share of right answers. meaning: first layer where the right meaning is on top for half of the prompts,
    or L + 1. overtakes: the first from which on B is above A, or L + 1. gap: see `dominant`. layers: a row each.
    """
    prompts, meanings = questions(source, target)
    firsts: dict[str, int] = dict(zip(LANGUAGES, OFFSETS, strict=True))
    asked = [
        Asked(prompt, target, {name: [meaning + first] for name, first in firsts.items()}, int(meaning))
        for prompt, meaning in zip(prompts, meanings[:, None], strict=True)
    ]
    spoken = by_language(specimen, specimen.lens, Lexicon(asked, LANGUAGES))[0].mean(0)  # (L + 1) x languages
    with watch(specimen.anatomy, ["residual"]) as seen:
        specimen.model.base_model(input_ids=prompts, use_cache=False)
    last = torch.stack([seen.residual[state][:, -1] for state in range(len(spoken))])
    chances = specimen.lens(last).double().softmax(-1)
    meant = chances[..., :MEANINGS] + chances[..., MEANINGS : 2 * MEANINGS]
    meant[..., :SMALL] += chances[..., 2 * MEANINGS : 2 * MEANINGS + SMALL]
    on_top = (meant.argmax(-1) == meanings).double().mean(1)
    right = (chances[-1].argmax(-1) == meanings + firsts[target]).double().mean()
    split = (spoken[:, 0] - spoken[:, 1]) / (spoken[:, 0] + spoken[:, 1])
    layers, known = middle(len(spoken)), on_top >= 0.5
    behind = (split >= 0).nonzero()
    return {
        "right": float(right), "meaning": int(known.int().argmax()) if known.any() else len(spoken),
        "overtakes": int(behind.max()) + 1 if len(behind) else 0,
        "gap": float(split[layers.start : layers.stop].mean()),
        "layers": [
            {"layer": number, **{name: float(p) for name, p in zip(LANGUAGES, row, strict=True)},
             "meaning on top": float(top)}
            for number, (row, top) in enumerate(zip(spoken, on_top, strict=True))
        ],
    }  # fmt: skip
