"""The commands, one file each. A file put here registers its command; nothing else has to know of it."""

from ...modules import import_all

import_all(__name__, __path__)
