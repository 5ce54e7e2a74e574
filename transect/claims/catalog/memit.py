"""Claims of MEMIT (Meng et al., ICLR 2023, arXiv:2210.07229)."""

from ..fact_editing import register

register("memit", "MEMIT", "arXiv:2210.07229")
