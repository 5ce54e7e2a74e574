"""Bigram subnetworks: the few weights that turn the current token into a bigram prediction."""

from . import bigram_subnetworks  # noqa: F401 - importing it registers it
