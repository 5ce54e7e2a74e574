"""Ranking architectures by W-PCA without training any of them, and how far a ranking agrees with given scores."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from ....anatomy import Anatomy
from ....data import Specimen, load
from ....errors import BadData, TransectError
from ...run import run_probes
from .w_pca import Where

if TYPE_CHECKING:
    import pandas as pd  # takes half a second, and most commands need none


@dataclass(frozen=True)
class Ranking:
    """table: a row an architecture, the best first: dimension (V), parameters and score (W-PCA), with the standard
    deviations of V and of the score over seeds (NaN for one seed). agreement: see there; None without scores."""

    table: pd.DataFrame
    agreement: pd.DataFrame | None


def rank_architectures(
    configs: Mapping[str, Any],
    data: Any,
    *,
    scores: Mapping[str, float] | None = None,
    eta: float = 0.99,
    where: Where = "pre",
    seeds: Sequence[int] = (0, 1, 2),
    build: Callable[[Any], Any] = AutoModelForCausalLM.from_config,
    tokenizer: Any = None,
) -> Ranking:
    """Rank architectures by W-PCA with random weights, the mean over some draws of them.

    configs: Hugging Face configs by name. data: text or token ids, the same for all, see `transect.data.load`; those
    that are text need the tokenizer. scores: of the trained models by name, the larger the better (minus a loss).
    eta, where: see `w_pca`. seeds: of the weights; torch's own random numbers go on as if nothing had been drawn.
    build: makes a model with random weights of a config.
    Raises TransectError for fewer than two architectures, no seed, and scores of others than these.
    """
    import pandas as pd

    if len(configs) < 2 or not seeds:
        raise TransectError(f"a ranking needs two architectures and one seed: got {len(configs)} and {len(seeds)}")
    if scores is not None and set(scores) != set(configs):
        raise BadData(f"scores are for {sorted(scores)}, and the architectures are {sorted(configs)}")
    rows = []
    for name, config in configs.items():
        found = [_measured(config, data, seed, eta, where, build, tokenizer) for seed in seeds]
        drawn = pd.DataFrame(found, columns=["dimension", "parameters", "score"])
        spread = drawn.std()
        rows.append(
            {"architecture": name, **drawn.mean(), "dimension_std": spread["dimension"], "score_std": spread["score"]}
        )
    table = pd.DataFrame(rows).astype({"parameters": int})
    compared = None
    if scores is not None:
        proxies = {name: table[name].tolist() for name in ("parameters", "dimension", "score")}
        compared = agreement(proxies, [scores[name] for name in configs], table["parameters"].tolist())
    return Ranking(table.sort_values("score", ascending=False, ignore_index=True, kind="stable"), compared)


def _measured(
    config: Any, data: Any, seed: int, eta: float, where: Where, build: Callable[[Any], Any], tokenizer: Any
) -> tuple[float, int, float]:
    """V, parameters and W-PCA of one draw of the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    specimen = Specimen(Anatomy(model), data=load(data, model, tokenizer))
    result = run_probes(specimen, {"w-pca": {"eta": eta, "where": where}})["w-pca"]
    return float(result["proxy"]), int(result["parameters"]), float(result["score"])


def agreement(
    proxies: Mapping[str, Sequence[float]], scores: Sequence[float], parameters: Sequence[float]
) -> pd.DataFrame:
    """Kendall's τ and Spearman's ρ of each proxy with the scores, plain and at a fixed number of parameters.

    The latter are partial rank correlations, (r_xy - r_xz r_yz) / √((1 - r_xz²)(1 - r_yz²)) with z the parameters. NaN
    where one side is constant, or a proxy orders as the parameters do. A row a proxy: tau, rho, partial_tau,
    partial_rho. Raises BadData where lengths differ, or are below two, and for what is not finite.
    """
    import pandas as pd

    lengths = {len(scores), len(parameters), *(len(values) for values in proxies.values())}
    if len(lengths) != 1 or min(lengths) < 2:
        raise BadData(f"rank correlations need two or more numbers of everything, and got {sorted(lengths)} of them")
    if not all(torch.tensor(list(values)).isfinite().all() for values in (scores, parameters, *proxies.values())):
        raise BadData("rank correlations need finite numbers")
    rows = {}
    for name, values in proxies.items():
        plain = [_correlations(*pair) for pair in ((values, scores), (values, parameters), (scores, parameters))]
        partial = [_partial(*three) for three in zip(*plain, strict=True)]
        rows[name] = dict(zip(("tau", "rho", "partial_tau", "partial_rho"), (*plain[0], *partial), strict=True))
    return pd.DataFrame.from_dict(rows, orient="index")


def _correlations(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Kendall's τ (b, with ties) and Spearman's ρ."""
    from scipy.stats import kendalltau, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a side that is constant: NaN says so
        return float(kendalltau(one, other)[0]), float(spearmanr(one, other)[0])  # type: ignore[arg-type]


def _partial(plain: float, with_first: float, with_second: float) -> float:
    left = (1 - with_first**2) * (1 - with_second**2)
    return (plain - with_first * with_second) / sqrt(left) if left > 1e-12 else float("nan")


def drawn_architectures(
    anatomy: Anatomy,
    count: int,
    *,
    depths: tuple[int, int] = (2, 6),
    widths: tuple[int, int] = (32, 96),
    ratios: tuple[int, int] = (1, 8),
    head: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Hugging Face configs of so many small models of a kind, each with other sizes; the same ones for a seed.

    anatomy: of a model of that kind, whose config gives everything else. depths: least and most blocks. widths: of the
    stream, in steps of `head`, the width of a head. ratios: of an MLP's neurons to the width.
    Raises TransectError where there are not so many, and where the architecture's description does not name the sizes.
    """
    names = anatomy.architecture.config
    missing = [size for size in ("blocks", "hidden", "heads", "neurons") if size not in names]
    if missing:
        raise TransectError(f"the description {anatomy.architecture.name!r} does not name {', '.join(missing)}")
    ranges = [range(low // step, high // step + 1) for (low, high), step in ((depths, 1), (widths, head), (ratios, 1))]
    sizes = [(blocks, head * heads, ratio) for blocks in ranges[0] for heads in ranges[1] for ratio in ranges[2]]
    if count > len(sizes):
        raise TransectError(f"there are {len(sizes)} such architectures, and {count} were asked for")
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    found = {}
    for blocks, width, ratio in sorted(sizes[place] for place in order[:count]):
        config = copy.deepcopy(anatomy.model.config)
        text = config.get_text_config()
        chosen = {
            "blocks": blocks, "hidden": width, "heads": width // head, "key_value_heads": width // head,
            "head_size": head, "neurons": ratio * width,
        }  # fmt: skip
        for size, value in chosen.items():
            if size in names:
                setattr(text, names[size], value)
        for per_block in anatomy.architecture.per_block:
            if values := getattr(text, per_block, None):  # deeper than the model: from its first block on again
                setattr(text, per_block, [values[block % len(values)] for block in range(blocks)])
        found[f"{blocks} x {width} x {ratio * width}"] = config
    return found
