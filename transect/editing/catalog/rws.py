"""A robust weight signature added to a model, or taken away again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ...data import Specimen
from ...errors import TransectError
from ...merging.registry import tensors_of
from ...merging.signature import read_signature, refuse_other_tensors
from ...parameters import Range, pieces
from ..journal import Journal
from ..registry import editing


def measure(specimen: Specimen) -> dict[str, float]:
    """Nothing but the loss, which the frame adds."""
    return {}


def check(specimen: Specimen, *, signature: str, strength: float) -> None:
    """Everything that can be wrong is found here, before any weight changes."""
    sources = pieces(signature)
    if not sources:
        raise TransectError("rws: name a signature (--rws.signature), which `transect merge --method rws` writes")
    for source in sources:
        refuse_other_tensors(read_signature(source), tensors_of(specimen.model))


@editing("rws", paper="arXiv:2302.12480", measure=measure, check=check, reads=lambda *_, **__: ())
def rws(
    specimen: Specimen, journal: Journal, *, signature: str = "", strength: Annotated[float, Range(-10, 10)] = 1.0
) -> Mapping[str, Any]:
    """Add robust weight signatures to a model of the base from which they were extracted.

    θ + strength / K Σ_k v_k over the K signatures. `transect edit --undo` takes it back bit for bit; a strength of the
    other sign takes it away from any model, up to rounding.

    signature: files, or folders that hold signature.safetensors, with commas in between.
    strength: what their mean is multiplied by; 0 changes nothing.
    """
    sources = pieces(signature)
    added: dict[str, Any] = {}
    for source in sources:
        for name, tensor in read_signature(source).items():
            added[name] = added[name] + tensor if name in added else tensor
    for name, tensor in added.items():
        if strength:
            share = strength / len(sources)
            journal.shift(name, share * tensor)
    return {"tensors changed": len(added) if strength else 0}
