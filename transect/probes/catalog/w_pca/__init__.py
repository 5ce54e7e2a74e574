"""W-PCA: a score that ranks architectures before any of them is trained."""

from .dimension import pca_dim
from .ranking import Ranking, agreement, drawn_architectures, rank_architectures
from .w_pca import w_pca

__all__ = ["Ranking", "agreement", "drawn_architectures", "pca_dim", "rank_architectures", "w_pca"]
