"""Transect: open up a trained transformer, factorize its weight matrices, and keep an ordinary checkpoint."""

__version__ = "0.1.0"
