"""What each layer adds, and who uses it: later layers, the prediction, later tokens."""

from . import depth_efficiency  # noqa: F401 - importing it registers it
