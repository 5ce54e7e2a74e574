"""FuseGPT: removing blocks and recycling their weights in their neighbours (Pei et al., 2024, arXiv:2411.14507)."""

from . import fusegpt  # noqa: F401 - importing it registers it
