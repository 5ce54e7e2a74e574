"""A letter that is answered whatever is asked: the MLP neurons that write it are turned away from it."""

from . import anchored_bias  # noqa: F401 - importing it registers it
