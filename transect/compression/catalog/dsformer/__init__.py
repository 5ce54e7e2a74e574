"""DSFormer: dense bases times row-sparse coefficients, for each block of columns (arXiv:2312.13211)."""

from .dsformer import dsformer, dsformer_size
from .projection import Projection, column_blocks, fitted_bases, project, starting_bases

__all__ = ["Projection", "column_blocks", "dsformer", "dsformer_size", "fitted_bases", "project", "starting_bases"]
