"""Claims of TSCNC (Feng et al., 2025, arXiv:2503.20454)."""

from . import tscnc  # noqa: F401 - importing it registers it
