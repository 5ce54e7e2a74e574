"""Full fine-tuning."""

from __future__ import annotations

from ..registry import adapter


@adapter("full", paper="-", size="", numbers=lambda d_out, d_in, size: d_out * d_in, rate=5e-5)
def full(paths: list[str]) -> None:
    """Every number of the model is trained, embeddings, norms and biases included; there is no adapter."""
