"""JLCM: jointly learnable codebooks and mappings (Yvinec, Dapogny, Bailly, ICLR 2024, arXiv:2309.17361)."""

from . import jlcm  # noqa: F401 - importing it registers it
