"""Robust weight signatures: a robust training's changes, added to a clean model."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ...errors import TransectError
from ..registry import Given, Range, merging, tensors_of
from ..signature import FILE, cosine, rounded, shallow_names, signature_of, write_signature


def _check(given: Given, *, strength: float, depth: float, levels: int) -> None:
    if levels == 1:
        raise TransectError("rws: levels=1 holds nothing; it should be 0 (as they are) or from 2")


@merging("rws", paper="arXiv:2302.12480", needs_base=True, check=_check)
def rws(
    given: Given,
    *,
    strength: Annotated[float, Range(-10, 10)] = 1.0,
    depth: Annotated[float, Range(0, 1, above=True)] = 0.5,
    levels: Annotated[int, Range(0, 65536)] = 256,
) -> dict[str, Tensor]:
    """Add to the first model what each other one, trained against a corruption, has learned beyond it.

    All were trained from the base, the first on clean data. Of each other model, tensor by tensor, the signature is its
    update without what lies along the first model's update; their mean is added, and written beside the result, in
    `signature.safetensors`, in few bits. `transect edit --method rws` adds it to other models of the same base, or
    takes it away. The factor enters once; the official script multiplies twice. Norms outside the kept blocks stay as
    they are, whereas the script puts the robust models' in their place.

    strength: what the signature is multiplied by.
    depth: share of the blocks, the shallowest, whose tensors are kept, with the embedding; 1 keeps all of the model.
        About half, as the paper does.
    levels: of the uniform grid on which each tensor of the signature is stored; 0 stores float32.
    """
    assert given.base is not None  # the frame saw to it
    first = given.models[0]
    start, clean = tensors_of(given.base.model), tensors_of(first.model)
    names = shallow_names(first, depth)
    found = [signature_of(start, clean, tensors_of(one.model), names) for one in given.models[1:]]
    mean = {name: sum((one[name] for one in found[1:]), found[0][name]) / len(found) for name in names}
    stored = rounded(mean, levels)
    given.files[FILE] = lambda folder: write_signature(folder / FILE, mean, levels)
    given.told["tensors in the signature"] = float(len(names))
    for i, one in enumerate(found):
        for j in range(i):
            given.told[f"cosine of the signatures of models {j + 2} and {i + 2}"] = cosine(found[j], one)
    patched = {name: clean[name].float() + strength * stored[name] for name in names}
    return patched if strength else {}
