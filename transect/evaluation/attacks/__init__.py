"""Attacks that judge a classifier: words exchanged for similar ones, and small steps on the embeddings."""

from .gradient import added, gradient_attack, perturbation
from .neighbours import Neighbours
from .substitution import Attacked, Robustness, substitution_attack

__all__ = [
    "Attacked",
    "Neighbours",
    "Robustness",
    "added",
    "gradient_attack",
    "perturbation",
    "substitution_attack",
]
