"""Feature neurons: MLP neurons named by the token that their weights decode to, and what holding them does."""

from . import feature_neurons  # noqa: F401 - importing it registers it
