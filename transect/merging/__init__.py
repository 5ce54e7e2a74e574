"""Merging trained models of one shape into one: a file for each method in `catalog`."""

from . import catalog  # noqa: F401 - importing one registers it
from .chain import match_chain
from .curve import Curve, barrier_of, curve_of, curve_of_module
from .matching import Matched, spectral_alignment
from .merge import merge_models
from .registry import Given, Merging, merging, merging_named, mergings
from .signature import read_signature, signature_of, write_signature

__all__ = [
    "Curve", "Given", "Matched", "Merging", "barrier_of", "curve_of", "curve_of_module", "match_chain", "merge_models",
    "merging", "merging_named", "mergings", "read_signature", "signature_of", "spectral_alignment", "write_signature",
]  # fmt: skip
