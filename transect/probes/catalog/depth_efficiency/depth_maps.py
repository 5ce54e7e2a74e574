"""Whether a deeper model does what a shallower one does in smaller steps: linear maps between their states.

Csordas et al. 2025 (arXiv:2505.13898), maps between models of one family. From every state h_m of the shallow model
a linear map with bias is fitted to every state h_l of the deep one, on the same tokens. The error is the mean of
|h_l - f(h_m)| / |h_l| over tokens that the fit did not see. If the deep model does the same in smaller steps, the
best m runs from the first state to the last in proportion to l; if it does more, its later states are not to be had
from any m. The closed form, the ridge and the number of tokens are our design.

The error is the same after any invertible linear change of the shallow basis (without ridge), and after any
rotation of the deep one. Other changes of the deep basis change what a relative error means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ....data import Specimen
from ....errors import BadData, NotApplicable, TransectError
from ....forward import at_rest, run_body, to_device, watch
from ...places import places, wide
from ...result import Quantity, Result

HELD_OUT = 4  # every fourth sequence is kept for the error
TOKENS = 20  # at least this many for each coordinate of the shallow state


def cross_model_maps(
    deep: Specimen,
    shallow: Specimen,
    *,
    deep_layers: Sequence[int] | None = None,
    shallow_layers: Sequence[int] | None = None,
    ridge: float = 1e-6,
) -> Result:
    """Error of the best linear map from each state of one model to each state of another, on the text of `deep`.

    deep, shallow: two causal models that read the same token ids. deep_layers, shallow_layers: states of the
    stream, 0 to L; default all. ridge: added to the Gram matrix, in units of its mean diagonal. The first token of
    a sequence is left out: its huge state would be all that the fit is about. Two passes over the text of both
    models; memory for each pair of states d_deep x d_shallow numbers in float64, so choose layers in large models.
    Raises NotApplicable where the models do not share their tokens, BadData where the text is too short.
    """
    for one in (deep, shallow):
        one.require_causal()
        one.require_contributions()
    known = [one.tokenizer.get_vocab() for one in (deep, shallow) if one.tokenizer is not None]
    if len(known) == 2 and known[0] != known[1]:
        raise NotApplicable("the two models cut text into different tokens: their states do not go together")
    targets, sources = _chosen(deep, deep_layers), _chosen(shallow, shallow_layers)
    maps = _fitted(deep, shallow, targets, sources, ridge)
    errors, count = _errors(deep, shallow, targets, sources, maps)
    best = errors.argmin(1)
    away = offsets(targets, sources, deep.layers, shallow.layers).gather(1, best[:, None]).mean()
    told = [
        f"Mean over the deep model's states, the best state of the other model is {float(away):.1f} layers away "
        f"from the one in proportion ({shallow.layers} layers against {deep.layers}); its error goes from "
        f"{float(errors.amin(1).min()):.3f} to {float(errors.amin(1).max()):.3f} of the state's length, on {count} "
        "tokens that the fit did not see."
    ]
    quantities = {
        "error": Quantity(errors, ("deep", "shallow"), "", "mean of |h - f(h')| / |h| on held-out tokens"),
        "best": Quantity(
            torch.tensor(sources)[best], ("deep",), "layer", "state of the shallow model with the smallest error"
        ),
    }
    labels = {"deep": [str(layer) for layer in targets], "shallow": [str(layer) for layer in sources]}
    return Result(quantities, told, ["A linear map finds what is linearly there, used or not."], labels)


def offsets(targets: Sequence[int], sources: Sequence[int], deep: int, shallow: int) -> Tensor:
    """How far each state m of the shallow model is from l M / L, the one in proportion to state l of the deep one.

    deep, shallow: their numbers of layers, L and M. Returns targets x sources, in layers of the shallow model.
    """
    return (torch.tensor(sources)[None] - torch.tensor(targets)[:, None] / deep * shallow).abs()


def _fitted(
    deep: Specimen, shallow: Specimen, targets: Sequence[int], sources: Sequence[int], ridge: float
) -> list[Tensor]:
    """For each source, the maps to all targets (targets x (d_shallow + 1) x d_deep)."""
    widths = [one.anatomy.config_value("hidden") for one in (deep, shallow)]
    grams = torch.zeros(len(sources), widths[1] + 1, widths[1] + 1, dtype=torch.float64)
    products = torch.zeros(len(sources), len(targets), widths[1] + 1, widths[0], dtype=torch.float64)
    tokens = 0
    for ys, xs in _states(deep, shallow, targets, sources, held_out=False):
        tokens += len(xs[0])
        for i, x in enumerate(xs):
            grams[i] += x.T @ x
            for j, y in enumerate(ys):
                products[i, j] += x.T @ y
    if tokens < TOKENS * widths[1]:
        raise BadData(
            f"the fit has {tokens} tokens for states of {widths[1]} numbers; give it at least "
            f"{TOKENS * widths[1]}, beside every {HELD_OUT}th sequence that is held out"
        )
    return [solve(gram, product, ridge) for gram, product in zip(grams, products, strict=True)]


def _errors(
    deep: Specimen, shallow: Specimen, targets: Sequence[int], sources: Sequence[int], maps: Sequence[Tensor]
) -> tuple[Tensor, int]:
    """Mean of |h - f(h')| / |h| over the held-out tokens (targets x sources), and how many these are."""
    errors, count = torch.zeros(len(targets), len(sources), dtype=torch.float64), 0
    for ys, xs in _states(deep, shallow, targets, sources, held_out=True):
        count += len(xs[0])
        for j, y in enumerate(ys):
            size = y.norm(dim=-1).clamp_min(1e-12)
            for i, x in enumerate(xs):
                errors[j, i] += ((y - x @ maps[i][j]).norm(dim=-1) / size).sum()
    if count == 0:
        raise BadData(f"the text has fewer than {HELD_OUT} sequences: none is left to measure the error on")
    return (errors / count).float(), count


def solve(gram: Tensor, products: Tensor, ridge: float) -> Tensor:
    """Maps F (n x (d + 1) x d') with F_j = (X'X + r I)^-1 X'Y_j; the last row, the bias, is not shrunk.

    gram: X'X ((d + 1) x (d + 1)), the last column of X being ones. products: X'Y_j (n x (d + 1) x d').
    """
    added = torch.full((len(gram),), ridge, dtype=gram.dtype) * gram.diagonal()[:-1].mean()
    added[-1] = 0
    damped = gram + added.diag()
    flat = products.transpose(0, 1).flatten(1)  # one factorization for all targets
    factor, failed = torch.linalg.cholesky_ex(damped)
    solved = torch.linalg.pinv(damped, hermitian=True) @ flat if failed else torch.cholesky_solve(flat, factor)
    return solved.unflatten(1, (len(products), -1)).transpose(0, 1)


@torch.no_grad()
def _states(
    deep: Specimen, shallow: Specimen, targets: Sequence[int], sources: Sequence[int], held_out: bool
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """For each batch: states of the deep model (n x d), of the shallow one with a one at the end; float64, CPU."""
    first = 0
    for batch in deep.text:
        rows = torch.arange(first, first + len(batch["input_ids"])) % HELD_OUT == HELD_OUT - 1
        first += len(rows)
        part = {name: tensor[rows == held_out] for name, tensor in batch.items() if name != "labels"}
        if not len(part["input_ids"]):
            continue
        ys, xs = _read(deep, part, targets), _read(shallow, part, sources)
        yield ys, [torch.cat([x, x.new_ones(len(x), 1)], 1) for x in xs]


def _read(specimen: Specimen, batch: dict[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    inputs = to_device(batch, specimen.model.device)
    vocabulary = specimen.model.get_input_embeddings().weight.shape[0]
    if int(inputs["input_ids"].max()) >= vocabulary:
        raise NotApplicable(f"the text has token ids beyond the {vocabulary} of {type(specimen.model).__name__}")
    with at_rest(specimen.model), watch(specimen.anatomy, ["residual"], layers) as seen:
        run_body(specimen.model, inputs)
    mask = inputs.get("attention_mask")
    seen.mask = None if mask is None else mask.bool()
    counted = places(seen, seen.residual[layers[0]]) > 0
    return [wide(seen.residual[layer][counted]).cpu().double() for layer in layers]


def _chosen(specimen: Specimen, layers: Sequence[int] | None) -> list[int]:
    chosen = list(range(specimen.layers + 1)) if layers is None else list(layers)
    if not chosen or not all(0 <= layer <= specimen.layers for layer in chosen):
        raise TransectError(f"states must be numbers from 0 to {specimen.layers}, at least one, got {chosen}")
    return chosen
