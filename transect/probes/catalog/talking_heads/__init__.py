"""Which heads talk to which later heads, and over how few directions (Merullo et al. 2024, arXiv:2406.09519)."""

from . import talking_heads  # noqa: F401 - importing it registers it
