"""Probes: what a trained model's weights, layers, heads and neurons are doing, as arrays, sentences and plots.

One file (or folder) a probe in `catalog`; a file put there registers its probe.
"""

from . import catalog  # noqa: F401 - importing a probe registers it
from .draw import Drawing, Listing, Plot, Table
from .registry import Looking, Probe, drawings, names_of, probe, probes, probing
from .result import KIND, Quantity, Result
from .run import Failure, Inspection, run_probes

__all__ = [
    "KIND", "Drawing", "Failure", "Inspection", "Listing", "Looking", "Plot", "Probe", "Quantity", "Result", "Table",
    "drawings", "names_of", "probe", "probes", "probing", "run_probes",
]  # fmt: skip
