"""Claims of the study of depth use (Csordas et al. 2025, arXiv:2505.13898)."""

from . import depth_efficiency, hops  # noqa: F401 - importing them registers them
