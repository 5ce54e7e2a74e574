"""Memorised text removed without naming it: the weight directions along which the loss hardly bends are cut away."""

from . import kfac_edit  # noqa: F401 - importing it registers it
