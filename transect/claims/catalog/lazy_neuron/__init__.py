"""Claims of the lazy neuron study (Li et al. 2023, arXiv:2210.06313) about the model at hand."""

from . import lazy_neuron  # noqa: F401 - importing it registers it
