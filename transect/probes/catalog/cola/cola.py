"""Which layers to skip or repeat for one input so that its answer is right: a search that knows the answer."""

from __future__ import annotations

from random import Random
from typing import Annotated, Literal

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import NotApplicable
from ....parameters import Range
from ...draw import Drawing, Table, lines
from ...registry import probing
from ...result import Quantity, Result
from .asked import Answers, Kind, Question, questions_of
from .cola_findings import CAVEATS, findings
from .paths import Path, Space, random_path, runs, segments, written
from .search import search

SPACES: tuple[Space, ...] = ("both", "skip", "repeat")
EDITS = ("skipped", "repeated")


def draw(result: Result) -> list[Drawing]:
    """The plots of a result, from its arrays alone."""
    spaces, layers = result.label("space", len(result["searched"])), result["skipped"].shape[1]
    longest = int(result["longest"])
    curves = {}
    for number, space in enumerate(spaces):
        curves[f"search, {space}"] = within(result["searched"][number], longest)
        curves[f"random paths, {space}"] = within(result["random"][number], longest)
    used = {}
    for number, space in enumerate(spaces):
        for name in EDITS:
            used[f"{name}, {space}"] = result[name][number]
            used[f"{name} on all paths tried, {space}"] = result[f"{name}_tried"][number]
    rows = zip(
        result.label("question", len(result["plain"])), result["plain"].tolist(), result["searched"][0].tolist(),
        result["random"][0].tolist(), result.label("program", len(result["plain"])), strict=True,
    )  # fmt: skip
    return [
        lines(
            "Oracle success by number of layers run", "Share of questions for which some path of at most so many "
            f"layers answers rightly. The answer is known to the search, so it is no accuracy; the model has {layers} "
            "layers.",
            curves, x=list(range(1, longest + 1)), xlabel="layers run", ylabel="share of questions",
        ),
        lines(
            "Which layers the shortest right paths leave out and repeat", "Share of these paths without the layer; "
            "mean number of further runs of it. Edits of stretches reach middle layers more often by themselves: "
            "compare with all paths that were tried.", used, xlabel="layer", ylabel="rate",
        ),
        Table(
            "Shortest right path of each question", "Layers in the order in which they are run.",
            ("question", "right as it is", "layers", "with random paths", "path"),
            [[text, bool(right), _count(found), _count(chance), path] for text, right, found, chance, path in rows],
        ),
    ]  # fmt: skip


def _count(length: float) -> str:
    return "none" if length != length else f"{length:.0f}"


def within(shortest: Tensor, longest: int) -> Tensor:
    """Share of questions whose shortest right path (NaN: none) is at most 1, 2 ... `longest` layers long."""
    return torch.stack([(shortest <= length).double().mean() for length in range(1, longest + 1)])


@probing("cola", title="Layers skipped or repeated for one input", paper="arXiv:2507.07996", draw=draw)
def cola(
    specimen: Specimen,
    *,
    kind: Kind = "any",
    inputs: Annotated[int, Range(1, 100000)] = 12,
    simulations: Annotated[int, Range(1, 100000)] = 100,
    space: Literal["both", "skip", "repeat", "all"] = "both",
    weight: Annotated[float, Range(0, 1000)] = 5.0,
    chance: Annotated[float, Range(0, 1)] = 0.1,
    longest: Annotated[float, Range(1, 16)] = 2.0,
    tokens: Annotated[int, Range(1, 64)] = 4,
) -> Result:
    """Search, for one input with a known answer, which layers to skip or repeat so that it is right with few layers.

    Li et al. 2025, sections 3 to 5: a Monte Carlo tree search over paths, see `search` and `paths`; a path is right if
    the model's layers, run in its order, lead to the right answer. The known answer is the reward, so what is found is
    an upper bound (oracle success) and no accuracy. Beside it stand two controls: as many different random paths, with
    as many edits as the searched ones have; and the chance of hitting the answer with as many different guesses as the
    paths gave answers, or those of fewer layers did. 200 simulations, weight 5 and chance 0.1 are the paper's by the
    accounts that others give of its appendix.

    Costs about twice `simulations` passes over each input and space.

    kind: facts (their first tokens are greedily right), choices (the best of their letters is), or any: facts where
        there are any, and choices otherwise.
    inputs: how many questions at most; of more, a choice at random.
    simulations: of each search; the first runs the model as it is.
    space: what edits may do: skip, repeat, both, or all for these three searches one after the other.
    weight: what a path's length, in times the model's, takes from its score (lambda).
    chance: of trying a further edit at random in place of the best by score.
    longest: path, in times the model's layers.
    tokens: of a fact's answer that have to be right.
    """
    specimen.require_causal()
    layers = specimen.layers
    if layers < 2:
        raise NotApplicable("it skips and repeats layers, and the model has only one")
    questions = questions_of(specimen, kind, inputs, tokens)
    spaces = SPACES if space == "all" else (space,)
    most = max(layers, round(longest * layers))
    found = [
        [_asked(specimen, one, number, part, simulations, weight, chance, most) for part in spaces]
        for number, one in enumerate(specimen.shown(questions, "paths through the layers"))
    ]
    by_space = list(zip(*found, strict=True))

    def of_all(name: str) -> Tensor:
        """A number of each question, by space."""
        return torch.tensor([[one[name] for one in row] for row in by_space], dtype=torch.float64)

    each, per_layer = ("space", "question"), ("space", "layer")
    quantities = {
        "plain": Quantity(of_all("plain")[0], ("question",), "", "1 where the model as it is answers rightly"),
        "searched": Quantity(of_all("searched"), each, "layers", "shortest right path that was found; NaN: none"),
        "random": Quantity(of_all("random"), each, "layers", "the same, of as many random paths"),
        "chance": Quantity(of_all("chance"), each, "probability", "of hitting with as many different guesses"),
        "chance_shorter": Quantity(of_all("chance_shorter"), each, "probability", "the same, of paths of fewer layers"),
        "answers": Quantity(of_all("answers"), each, "", "different answers of the searched paths"),
        "right_paths": Quantity(of_all("right_paths"), each, "share", "right paths of those searched"),
        "longest": Quantity(torch.tensor(float(most)), (), "layers", "longest path allowed"),
    }
    for name, repeated in zip(EDITS, (False, True), strict=True):
        best = [[path for one in row if (path := one["best"]) is not None] for row in by_space]
        tried = [[path for one in row for path in one["tried"]] for row in by_space]
        about = "further runs of the layer, mean" if repeated else "paths without the layer"
        for suffix, paths, whose in (("", best, "shortest right paths"), ("_tried", tried, "all paths tried")):
            rates = torch.stack([rates_of(row, layers, repeated) for row in paths])
            quantities[f"{name}{suffix}"] = Quantity(rates, per_layer, "", f"{whose}: {about}")
        lengths = [[length for path in row for length in segments(runs(path, layers), repeated)] for row in best]
        means = torch.tensor([sum(row) / len(row) if row else torch.nan for row in lengths], dtype=torch.float64)
        quantities[f"{name}_segment"] = Quantity(means, ("space",), "layers", f"neighbouring layers {name}, mean")
    programs = ["none" if row[0]["best"] is None else written(row[0]["best"], layers) for row in found]
    labels = {"space": spaces, "question": [one.text for one in questions], "program": programs}
    told = findings({name: one.values for name, one in quantities.items()}, spaces, simulations)
    return Result(quantities, told, CAVEATS, labels)


def _asked(
    specimen: Specimen, question: Question, number: int, space: Space, simulations: int, weight: float, chance: float,
    longest: int,
) -> dict:  # fmt: skip
    """One question in one space: the search, and its controls."""
    layers, answers = specimen.layers, Answers(specimen, question)
    seed = specimen.seed * 1_000_003 + number
    found = search(
        layers, answers, simulations=simulations, space=space, weight=weight, chance=chance, longest=longest, seed=seed
    )
    tried = list(found.rewards)
    drawn = random_paths(layers, found.depths, space, longest, Random(seed + 1))
    answers.executor.run(drawn)
    by_chance = [path for path in drawn if answers(path)]
    different = answers.different(tried)
    of_shorter = answers.different([path for path in tried if len(path) < layers])
    return {
        "plain": found.rewards[tuple(range(layers))],
        "searched": torch.nan if found.shortest is None else len(found.shortest),
        "random": min(map(len, by_chance), default=torch.nan),
        "chance": question.chance(different), "chance_shorter": question.chance(of_shorter), "answers": different,
        "right_paths": sum(found.rewards.values()) / len(tried), "best": found.shortest, "tried": tried,
    }  # fmt: skip


def random_paths(layers: int, depths: list[int], space: Space, longest: int, random: Random) -> list[Path]:
    """As many different paths as there are depths, each with so many edits (more where fewer lead to nothing new)."""
    drawn: dict[Path, None] = {}
    for depth in depths:
        for tries in range(100):
            path = random_path(layers, depth + tries // 20, space, longest, random)
            if path not in drawn:
                drawn[path] = None
                break
    return list(drawn)


def rates_of(paths: list[Path], layers: int, repeated: bool) -> Tensor:
    """By layer (L): the share of paths without it, or how often it is run again, mean; NaN for no path."""
    if not paths:
        return torch.full((layers,), torch.nan, dtype=torch.float64)
    counts = torch.tensor([runs(path, layers) for path in paths], dtype=torch.float64)
    return ((counts - 1).clamp_min(0) if repeated else (counts == 0).double()).mean(0)
