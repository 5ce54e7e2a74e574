"""Which layers a token uses, in prompts and in what the model writes."""

from . import lac  # noqa: F401 - importing it registers it
