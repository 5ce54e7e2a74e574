"""Mixed: for each matrix the structure that loses least by the byte. Transect's own."""

from . import mixed  # noqa: F401 - importing it registers it
