"""The studies, one file or folder each."""

from ...modules import import_all

import_all(__name__, __path__)
