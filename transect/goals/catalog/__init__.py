"""The objectives, one file or folder each. A file put here is registered; nothing else has to know of it."""

from ...modules import import_all

import_all(__name__, __path__)
