"""Peri-LN (Kim et al., ICML 2025, arXiv:2502.02732): the places of norms, and output norms for a trained model."""

from .conversion import add_output_norms
from .placements import OutputLN, PeriLN, PostLN, PreLN

__all__ = ["OutputLN", "PeriLN", "PostLN", "PreLN", "add_output_norms"]
