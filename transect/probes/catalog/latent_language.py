"""Latent language: what each layer would say if the model stopped there, by kind of token and by language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ...activations import Lens, Specimen, watch
from ...data.concepts import Concept, load_concepts
from ...errors import BadData, NotApplicable
from ..draw import Drawing, lines
from ..neurons import wide
from ..registry import Looking, probing
from ..result import Quantity, Result
from ..scripts import kinds_of_tokens

ENTRIES = 2**24  # numbers in one chunk of logits
BATCH = 64
MIDDLE_MASS = 0.1  # from which probability on a language counts as latent


def draw(result: Result) -> list[Drawing]:
    """Entropy and distance to the end by layer, mass by kind of token, and probabilities by language."""
    drawings: list[Drawing] = [
        lines(
            "How far from the answer each layer is", "Entropy of what the layer would predict, and its divergence from "
            "what the model predicts in the end.", {"entropy": result["entropy"], "divergence": result["divergence"]},
            xlabel="layer", ylabel="nats",
        )
    ]  # fmt: skip
    if "kinds" in result.quantities:
        mass, names = result["kinds"], result.label("kind", 0)
        largest = mass.amax(0).topk(min(8, len(names))).indices.tolist()
        note = "Probability that each layer gives to the tokens of a kind; the eight kinds that get most."
        series = {names[kind]: mass[:, kind] for kind in largest}
        drawings.append(lines("Kinds of tokens", note, series, xlabel="layer", ylabel="probability"))
    if "language" in result.quantities:
        names = result.label("language", 0)
        for number, target in enumerate(names):
            if result["language"][number].isfinite().any():
                series = {name: result["language"][number, :, other] for other, name in enumerate(names)}
                note = f"Probability of the answer's word in each language, after prompts that ask for {target}."
                drawings.append(
                    lines(
                        f"Language of the answer, asked in {target}", note, series, xlabel="layer", ylabel="probability"
                    )
                )
    return drawings[:4]


@probing(
    "latent-language", title="What the layers would say", paper="arXiv:2408.10811", watches=["residual"], draw=draw
)
def latent_language(specimen: Specimen, *, concepts: str = "") -> Looking:
    """Read every layer through the logit lens: its entropy, its kind of token, and the language of its answers.

    The lens is the model's own final norm and unembedding on the residual stream, without any training. On running
    text: entropy, divergence KL(final || layer), rank of the final layer's top token, probability by kind of token.
    With concepts, after each prompt: P_l(w) = Π_i p_l(t_i | x, t_<i) for a word w of tokens t_i, teacher-forced, every
    factor read at its own position (the natural formula for several tokens; the paper's was not verified), summed over
    a language's forms, and averaged over the concepts. Of two forms of which one begins the other, the shorter alone
    counts, since its probability contains the longer one's. Concepts whose words share a first token between languages
    are left out. A language is latent where P_l > 0.1 (ours) in the middle half of the layers while the target's is
    lower. Token energy, from the earlier paper arXiv:2402.10588 as recalled (unverified): E(h)² = mean_v cos²(w_v, h) /
    sqrt(mean_uv cos²(w_u, w_v)), here in units of a random h's. Cost: 2 V d operations for each token and layer.

    concepts: a JSON file of prompts with their answers' words by language, see `transect.data.concepts`; or `organism`
        for the bundled model's two languages.
    """
    lens = specimen.lens
    known = load_concepts(concepts) if concepts else []
    spoken = _Spoken(specimen, known) if known else None
    names, index = [], None
    if specimen.tokenizer is not None:
        names, index = kinds_of_tokens(specimen.tokenizer, len(lens.weight))
    gram = _energy_form(lens)
    states = specimen.layers + 1
    sums, mass = torch.zeros(states, 4, dtype=torch.float64), torch.zeros(states, len(names), dtype=torch.float64)
    first, count = torch.zeros(states, dtype=torch.float64), 0
    while (seen := (yield)) is not None:
        real = torch.ones_like(seen.residual[0][..., 0], dtype=torch.bool) if seen.mask is None else seen.mask
        rows = {state: seen.residual[state][real] for state in range(states)}
        step = max(1, ENTRIES // len(lens.weight))
        count += len(rows[0])
        for start in range(0, len(rows[0]), step):
            final = wide(lens(rows[states - 1][start : start + step])).log_softmax(-1)
            top = final.argmax(-1, keepdim=True)
            for state in range(states):
                part = rows[state][start : start + step]
                logs = wide(lens(part)).log_softmax(-1)
                chances = logs.exp()
                rank = (logs > logs.gather(-1, top)).sum(-1)
                sums[state] += torch.stack(
                    [
                        -(chances * logs).nan_to_num(0).sum(), (final.exp() * (final - logs)).nan_to_num(0).sum(),
                        rank.sum(), _energy(lens, gram, part).sum(),
                    ]
                ).double().cpu()  # fmt: skip
                first[state] += int((rank == 0).sum())
                if index is not None:
                    mass[state].index_add_(0, index, chances.sum(0).double().cpu())
    entropy, divergence, rank, energy = (sums / count).unbind(1)
    result = Result(
        {
            "entropy": Quantity(entropy, ("state",), "nats", "entropy of the prediction"),
            "divergence": Quantity(divergence, ("state",), "nats", "KL(final || layer)"),
            "rank": Quantity(rank, ("state",), "", "mean rank of the final layer's top token, 0 is the top"),
            "agreement": Quantity(
                first / count, ("state",), "share", "positions whose top token is already the final one"
            ),
            "energy": Quantity(energy, ("state",), "", "token energy, 1 for a random state"),
        }
    )
    result.findings = _about_text(result)
    result.caveats = [
        "The lens is biased in early layers: a low probability there does not show that it means another thing.",
        "With tied embeddings layer 0 is near its own input token, so words of the prompt look likely early.",
    ]
    if index is not None:
        result.quantities["kinds"] = Quantity(mass / count, ("state", "kind"), "probability", "mass by kind of token")
        result.labels = {"kind": names}
        result.findings = [*result.findings, _about_kinds(mass / count, names)]
    if spoken is not None:
        spoken.report(specimen, lens, result)
    return result


def _energy_form(lens: Lens) -> tuple[Tensor, float]:
    """Ŵᵀ Ŵ / V (d x d) of the unembedding with rows of length 1, and sqrt(mean cos²) between its rows."""
    gram = torch.zeros(lens.weight.shape[1], lens.weight.shape[1], device=lens.weight.device)
    for rows in lens.weight.split(2**16):
        normed = torch.nn.functional.normalize(rows.float(), dim=1)
        gram += normed.T @ normed
    gram /= len(lens.weight)
    return gram, float(gram.norm())


def _energy(lens: Lens, form: tuple[Tensor, float], residual: Tensor) -> Tensor:
    """Token energy of states (n), in units of what a state in a random direction has."""
    normed = residual if lens.norm is None else lens.norm(residual)
    unit = torch.nn.functional.normalize(normed.float(), dim=-1)
    gram, scale = form
    energy = ((unit @ gram) * unit).sum(-1).clamp_min(0) / scale
    return (energy / (gram.trace() / len(gram) / scale)).sqrt()


class _Spoken:
    """Concepts as token ids, filtered; and their probabilities layer by layer."""

    def __init__(self, specimen: Specimen, known: Sequence[Concept]) -> None:
        self.languages = list(dict.fromkeys(language for concept in known for language in concept.words))
        self.kept: list[tuple[Concept, Tensor, dict[str, list[Tensor]]]] = []
        self.given_away = 0
        for concept in known:
            prompt = specimen.encode(concept.prompt)
            if not len(prompt):
                raise BadData(f"the prompt {concept.prompt!r} has no tokens, so nothing precedes its answer")
            forms = {name: _forms(specimen, concept, words) for name, words in concept.words.items()}
            starts = [{int(form[0]) for form in one} for one in forms.values()]
            if sum(map(len, starts)) == len(set().union(*starts)):
                self.kept.append((concept, prompt, forms))
                said = concept.prompt.split()
                self.given_away += any(form in said for words in concept.words.values() for form in words)
        self.left_out = len(known) - len(self.kept)
        if not self.kept:
            raise NotApplicable(
                "in every concept, words of two languages begin with the same token: nothing tells them apart"
            )

    def report(self, specimen: Specimen, lens: Lens, result: Result) -> None:
        """Add probabilities by language to a result."""
        numbered = [
            (n, name, form) for n, (_, _, forms) in enumerate(self.kept) for name in forms for form in forms[name]
        ]
        logs = lens_log_probabilities(specimen, lens, [(self.kept[n][1], form) for n, _, form in numbered])
        states, names = logs.shape[1], self.languages
        whole = torch.full((len(self.kept), states, len(names)), torch.nan, dtype=torch.float64)
        normed = whole.clone()
        for (number, name, form), row in zip(numbered, logs, strict=True):
            place = (number, slice(None), names.index(name))
            whole[place] = whole[place].nan_to_num(0) + row.exp()
            normed[place] = torch.maximum(normed[place].nan_to_num(0), (row / len(form)).exp())
        targets = torch.tensor([names.index(concept.target) for concept, _, _ in self.kept])
        tables = [
            torch.stack([values[targets == target].nanmean(0) for target in range(len(names))])
            if values.numel() else values for values in (whole, normed)
        ]  # fmt: skip
        result.quantities |= {
            "language": Quantity(
                tables[0], ("target", "state", "language"), "probability", "of the answer's word, by language"
            ),
            "language per token": Quantity(
                tables[1], ("target", "state", "language"), "probability", "geometric mean over the word's tokens"
            ),
        }
        result.labels = {**result.labels, "language": names, "target": names}
        final = whole[torch.arange(len(targets)), -1, targets]
        result.findings = [*result.findings, *self._about(tables[0], float((final > 0.5).double().mean()), targets)]
        if self.left_out:
            text = f"{self.left_out} concepts were left out: words of two languages begin with the same token."
            result.caveats = [*result.caveats, text]
        if self.given_away:
            text = f"{self.given_away} prompts contain a word of the answer, which then looks known too early."
            result.caveats = [*result.caveats, text]
        result.caveats = [
            *result.caveats,
            "Probabilities of words that are several tokens shrink with every token; compare such languages by the "
            "probability per token, and never across tokenizers.",
        ]

    def _about(self, table: Tensor, answered: float, targets: Tensor) -> list[str]:
        found = [
            f"After {answered:.0%} of {len(self.kept)} prompts the model gives the right word of the target language "
            "more than half of the probability."
        ]
        if answered < 0.5:
            found[0] += " It does not know most answers, so the curves by language say little."
        states = table.shape[1]
        middle = range(states // 4, states - states // 4)
        for target in targets.unique().tolist():
            name, latent = self.languages[target], []
            for other, spoken in enumerate(self.languages):
                ahead = [
                    s for s in middle if table[target, s, other] > max(MIDDLE_MASS, float(table[target, s, target]))
                ]
                if other != target and ahead:
                    best = max(ahead, key=lambda state: float(table[target, state, other]))
                    latent.append(f"{spoken} (probability {float(table[target, best, other]):.2f} at layer {best})")
            largest = {
                spoken: float(table[target, middle.start : middle.stop, other].nan_to_num(0).max())
                for other, spoken in enumerate(self.languages)
            }
            shown = ", ".join(f"{spoken} {value:.3f}" for spoken, value in largest.items())
            found.append(
                f"Asked in {name}, the middle layers pass through {' and '.join(latent)} before the target."
                if latent
                else f"Asked in {name}, no other language is latent: the largest probabilities in the middle half of "
                f"the layers are {shown}."
            )
        return found


def _forms(specimen: Specimen, concept: Concept, words: Sequence[str]) -> list[Tensor]:
    """Token ids of a word's forms, without those that another one begins."""
    unknown = getattr(specimen.tokenizer, "unk_token_id", None)
    cut = [tuple(specimen.continuation(concept.prompt, word).tolist()) for word in words]
    for word, ids in zip(words, cut, strict=True):
        if unknown is not None and unknown in ids:
            raise BadData(f"the word {word!r} after {concept.prompt!r} is not in the tokenizer's vocabulary")
    cut = list(dict.fromkeys(cut))
    return [torch.tensor(ids) for ids in cut if not any(ids != other and ids[: len(other)] == other for other in cut)]


@torch.no_grad()
def lens_log_probabilities(specimen: Specimen, lens: Lens, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """log P_l of each continuation after its prompt, in every layer (n x (L + 1)), nats, float64.

    pairs: token ids of the prompt and of the continuation. Nothing is padded: pairs of one shape go together.
    """
    states = specimen.layers + 1
    out = torch.zeros(len(pairs), states, dtype=torch.float64)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (prompt, word) in enumerate(pairs):
        groups[len(prompt), len(word)].append(number)
    for (_, length), group in groups.items():
        step = max(1, min(BATCH, ENTRIES // (length * len(lens.weight))))
        for start in range(0, len(group), step):
            numbers = group[start : start + step]
            ids = torch.stack([torch.cat(pairs[number]) for number in numbers]).to(specimen.model.device)
            with watch(specimen.anatomy, ["residual"]) as seen:
                specimen.model.base_model(input_ids=ids, use_cache=False)
            for state in range(states):
                logs = wide(lens(seen.residual[state][:, -length - 1 : -1])).log_softmax(-1)
                chosen = logs.gather(-1, ids[:, -length:, None])[..., 0]
                out[numbers, state] = chosen.double().sum(1).cpu()
    return out


def _about_text(result: Result) -> list[str]:
    entropy, divergence, agreement = result["entropy"], result["divergence"], result["agreement"]
    last = len(entropy) - 1
    settled = next(state for state in range(last + 1) if agreement[state] >= 0.5)
    middle = last // 2
    return [
        f"From layer {settled} of {last} on, more than half of the positions already have the final top token first. "
        f"In the middle (layer {middle}) it is {float(agreement[middle]):.0%}, the entropy is "
        f"{float(entropy[middle]):.2f} nats against {float(entropy[last]):.2f} in the end, and KL(final || layer) is "
        f"{float(divergence[middle]):.2f} nats."
    ]


def _about_kinds(mass: Tensor, names: Sequence[str]) -> str:
    middle = (len(mass) - 1) // 2
    kind = int((mass[middle] - mass[-1]).abs().argmax())
    return (
        f"Between the middle (layer {middle}) and the end, the kind of token whose probability changes most is "
        f"{names[kind]}: {float(mass[middle, kind]):.2f} to {float(mass[-1, kind]):.2f}."
    )
