"""Which layers to skip or repeat for one input so that its answer is right: a search that knows the answer."""

from . import cola  # noqa: F401 - importing it registers it
