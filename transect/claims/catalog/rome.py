"""Claims of ROME (Meng et al., NeurIPS 2022, arXiv:2202.05262)."""

from ..fact_editing import register

register("rome", "ROME", "arXiv:2202.05262")
