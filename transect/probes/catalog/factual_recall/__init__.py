"""How facts get from the subject to the answer: heads that carry, MLPs that add, and a last layer that may pull."""

from . import factual_recall  # noqa: F401 - importing it registers it
