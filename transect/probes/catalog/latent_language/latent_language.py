"""Latent language: what each layer would say if the model stopped there, by kind of token and by language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ....data import Specimen
from ....data.concepts import load_concepts
from ....parameters import Range
from ...draw import Drawing, lines
from ...registry import Looking, probing
from ...result import Quantity, Result
from .language_dimensions import SWAPS, WORDS, Dimensions, dimensions_of
from .languages import Lexicon, by_language, by_target, middle, tokenised
from .lens_on_text import LensSums
from .scripts import kinds_of_tokens

MIDDLE_MASS = 0.1  # from which probability on a language counts as latent


def draw(result: Result) -> list[Drawing]:
    """Entropy and distance to the end by layer, mass by kind of token, probabilities by language, and swaps."""
    drawings: list[Drawing] = [
        lines(
            "How far from the answer each layer is",
            "Entropy of what the layer would predict, and its divergence from what the model predicts in the end.",
            {"entropy": result["entropy"], "divergence": result["divergence"]}, xlabel="layer", ylabel="nats",
        )
    ]  # fmt: skip
    if "kinds" in result.quantities:
        mass, names = result["kinds"], result.label("kind", 0)
        largest = mass.amax(0).topk(min(8, len(names))).indices.tolist()
        note = "Probability that each layer gives to the tokens of a kind; the eight kinds that get most."
        series = {names[kind]: mass[:, kind] for kind in largest}
        drawings.append(lines("Kinds of tokens", note, series, xlabel="layer", ylabel="probability"))
    if "language" in result.quantities:
        drawings += drawn_languages(result)
    if "swapped answers" in result.quantities:
        drawings.append(drawn_swaps(result))
    return drawings


def drawn_languages(result: Result) -> list[Drawing]:
    """The first two languages that prompts ask for."""
    names = result.label("language", 0)
    asked = [number for number in range(len(names)) if result["language"][number].isfinite().any()]
    return [
        lines(
            f"Language of the answer, asked in {names[number]}",
            f"Probability of the answer's word in each language, after prompts that ask for {names[number]}.",
            {name: result["language"][number, :, other] for other, name in enumerate(names)},
            xlabel="layer", ylabel="probability",
        )
        for number in asked[:2]
    ]  # fmt: skip


def drawn_swaps(result: Result) -> Drawing:
    """What swapped dimensions do to the answer."""
    answers, other, anything = result["swapped answers"], WORDS.index(WORDS[1]), WORDS.index(WORDS[2])
    return lines(
        "Swapped between two prompts of one concept",
        "Some dimensions of the state before the answer take the values of the same question in another language, "
        "at one layer. If they carry the language alone, the answer's word changes its language, and any language "
        "keeps its probability.",
        {f"other language, {name}": answers[number, :, other] for number, name in enumerate(SWAPS)}
        | {f"any language, {SWAPS[1]}": answers[1, :, anything]},
        xlabel="layer", ylabel="probability",
    )  # fmt: skip


@probing(
    "latent-language", title="What the layers would say", paper="arXiv:2408.10811", watches=["residual"], draw=draw
)
def latent_language(
    specimen: Specimen,
    *,
    concepts: str = "",
    dimensions: Annotated[float, Range(0, 0.5)] = 0.05,
    tokens: Annotated[int, Range(1, 10**9)] = 4096,
) -> Looking:
    """Read every layer through the logit lens: its entropy, its kind of token, and the language of its answers.

    The lens is the model's own final norm and unembedding on the residual stream, without any training. On running
    text: entropy, divergence KL(final || layer), rank of the final layer's top token, probability by kind of token.
    With concepts, after each prompt: P_l(w) = Π_i p_l(t_i | x, t_<i) for a word w of tokens t_i, teacher-forced,
    every factor read at its own position (the natural formula for several tokens; the paper's was not verified),
    summed over a language's forms, and averaged over the concepts. Of two forms of which one begins the other, the
    shorter alone counts, since its probability contains the longer one's. Concepts whose words share a first token
    between languages are left out. A language is latent where P_l > 0.1 (ours) in the middle half of the layers
    while the target's is lower. Token energy, from the earlier paper arXiv:2402.10588 as recalled (unverified):
    E(h)² = mean_v cos²(w_v, h) / sqrt(mean_uv cos²(w_u, w_v)), here in units of a random h's. Cost: 2 V d
    operations for each token and layer.

    Where concepts with the same words are asked in several languages: by layer and dimension of the state before
    the answer, variance between languages / total variance, around the mean of each concept; and the answer when
    the dimensions where this is largest are swapped between the prompts of a concept at one layer. The design is
    ours: half of the meanings rank the dimensions, swaps are measured on the others, with as many random dimensions
    as control.

    concepts: a JSON file of prompts with their answers' words by language, see `transect.data.concepts`; or
        `organism` for the bundled model's two languages.
    dimensions: share of the dimensions that are swapped, one at least (the default is our choice).
    tokens: of the running text that are looked at, at most, evenly spread over it (the default is our choice).
    """
    lens = specimen.lens
    known = load_concepts(concepts) if concepts else []
    lexicon = tokenised(specimen, known) if known else None
    names, index = [], None
    if specimen.tokenizer is not None:
        names, index = kinds_of_tokens(specimen.tokenizer, len(lens.weight))
    states = specimen.layers + 1
    sums = LensSums(lens, states, names, index)
    step, passed = max(1, -(-specimen.text.tokens // tokens)), 0
    while (seen := (yield)) is not None:
        real = torch.ones_like(seen.residual[0][..., 0], dtype=torch.bool) if seen.mask is None else seen.mask
        chosen = torch.arange(passed, passed + int(real.sum())) % step == 0
        passed += len(chosen)
        if chosen.any():
            sums.add({state: seen.residual[state][real][chosen] for state in range(states)})
    result = Result(sums.quantities(), labels={"kind": names} if names else {})
    result.findings = about_text(result)
    result.caveats = [
        "The lens is biased in early layers: a low probability there does not show that it means another thing.",
        "With tied embeddings layer 0 is near its own input token, so words of the prompt look likely early.",
    ]
    if lexicon is not None:
        add_languages(result, lexicon, *by_language(specimen, lens, lexicon))
        add_dimensions(result, dimensions_of(specimen, lens, lexicon, dimensions))
    return result


def add_languages(result: Result, lexicon: Lexicon, whole: Tensor, normed: Tensor) -> None:
    """Add probabilities by language (see `by_language`) to a result."""
    axes, names = ("target", "state", "language"), list(lexicon.languages)
    table = by_target(whole, lexicon)
    result.quantities |= {
        "language": Quantity(table, axes, "probability", "of the answer's word, by language"),
        "language per token": Quantity(
            by_target(normed, lexicon), axes, "probability", "geometric mean over the word's tokens"
        ),
    }
    result.labels = {**result.labels, "language": names, "target": names}
    targets = lexicon.targets
    answered = float((whole[torch.arange(len(targets)), -1, targets] > 0.5).double().mean())
    first = (
        f"After {answered:.0%} of {len(targets)} prompts the model gives the right word of the target language "
        "more than half of the probability."
    )
    if answered < 0.5:
        first += " It does not know most answers, so the curves by language say little."
    told = [about_target(table[target], names, target) for target in targets.unique().tolist()]
    result.findings = [*result.findings, first, *told]
    caveats = list(result.caveats)
    if lexicon.left_out:
        text = f"{lexicon.left_out} concepts were left out: words of two languages begin with the same token."
        caveats.append(text)
    if lexicon.given_away:
        text = f"{lexicon.given_away} prompts contain a word of the answer, which then looks known too early."
        caveats.append(text)
    caveats.append(
        "Probabilities of words that are several tokens shrink with every token; compare such languages by the "
        "probability per token, and never across tokenizers."
    )
    result.caveats = caveats


def about_target(table: Tensor, names: Sequence[str], target: int) -> str:
    """What the middle layers say after prompts that ask for one language. table: (L + 1) x languages."""
    layers, latent = middle(len(table)), []
    for other, spoken in enumerate(names):
        ahead = [state for state in layers if table[state, other] > max(MIDDLE_MASS, float(table[state, target]))]
        if other != target and ahead:
            best = max(ahead, key=lambda state: float(table[state, other]))
            latent.append(f"{spoken} (probability {float(table[best, other]):.2f} at layer {best})")
    if latent:
        return f"Asked in {names[target]}, the middle layers pass through {' and '.join(latent)} before the target."
    largest = table[layers.start : layers.stop].nan_to_num(0).amax(0).tolist()
    shown = ", ".join(f"{spoken} {value:.3f}" for spoken, value in zip(names, largest, strict=True))
    return (
        f"Asked in {names[target]}, no other language is latent: the largest probabilities in the middle half of "
        f"the layers are {shown}."
    )


def add_dimensions(result: Result, found: Dimensions | None) -> None:
    """Add what tells languages apart to a result."""
    if found is None:
        text = (
            "Dimensions that carry the language are not shown: too few concepts are asked in several languages "
            "with the same words (4 meanings at least)."
        )
        result.caveats = [*result.caveats, text]
        return
    result.quantities |= {
        "language variance": Quantity(
            found.apart, ("state", "dimension"), "share", "of a dimension's variance that is between languages"
        ),
        "language held": Quantity(
            found.held, ("state",), "share", "of the squared distance between languages, in the top dimensions"
        ),
        "swapped answers": Quantity(
            found.answers, ("swap", "state", "word"), "probability", "of the answer's word after a swap at one layer"
        ),
    }
    result.labels = {**result.labels, "swap": list(SWAPS), "word": list(WORDS)}
    layers = middle(found.answers.shape[1])
    mean = found.answers[:, layers.start : layers.stop].mean(1)
    held = float(found.held[layers.start : layers.stop].mean())
    told = [
        f"with {name} of one layer swapped {float(row[1]):.3f}, and in any language {float(row[2]):.3f}"
        for name, row in zip(SWAPS[1:], mean[1:], strict=True)
    ]
    text = (
        f"In the middle half of the layers, the {found.count} dimensions of {found.apart.shape[1]} that tell "
        f"languages apart best hold {held:.0%} of the squared distance between them. The answer's word in the "
        f"language of the other prompt has probability {float(mean[0, 1]):.3f}, in any language "
        f"{float(mean[0, 2]):.3f}; {'; '.join(told)}. Dimensions were ranked on {found.ranked} concepts and swapped "
        f"in {found.swapped} others."
    )
    result.findings = [*result.findings, text]
    last = (
        "Where all prompts of a language end with the same token, layer 0 knows the language alone: its dimensions "
        "tell languages apart perfectly, and their order means nothing."
    )
    result.caveats = [*result.caveats, last]


def about_text(result: Result) -> list[str]:
    """What running text shows."""
    entropy, divergence, agreement = result["entropy"], result["divergence"], result["agreement"]
    last = len(entropy) - 1
    settled = next(state for state in range(last + 1) if agreement[state] >= 0.5)
    half = last // 2
    told = [
        f"From layer {settled} of {last} on, more than half of the positions already have the final top token "
        f"first. In the middle (layer {half}) it is {float(agreement[half]):.0%}, the entropy is "
        f"{float(entropy[half]):.2f} nats against {float(entropy[last]):.2f} in the end, and KL(final || layer) is "
        f"{float(divergence[half]):.2f} nats."
    ]
    if "kinds" in result.quantities:
        mass = result["kinds"]
        kind = int((mass[half] - mass[-1]).abs().argmax())
        told.append(
            f"Between the middle (layer {half}) and the end, the kind of token whose probability changes most is "
            f"{result.label('kind', 0)[kind]}: {float(mass[half, kind]):.2f} to {float(mass[-1, kind]):.2f}."
        )
    return told
