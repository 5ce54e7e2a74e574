"""Which words and heads an output comes from, by contextual decomposition (Hsu et al. 2024, arXiv:2407.00886)."""

from . import cd_t  # noqa: F401 - importing it registers it
