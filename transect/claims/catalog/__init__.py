"""The claims, one file (or folder) for each method; a file put here registers its claims."""

from ...modules import import_all

import_all(__name__, __path__)
