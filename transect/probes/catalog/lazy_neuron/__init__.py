"""How few MLP neurons are active: by layer, neuron and place in the text, and what the others are good for."""

from . import lazy_neuron  # noqa: F401 - importing it registers it
