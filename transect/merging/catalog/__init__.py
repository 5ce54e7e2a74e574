"""The ways to merge: every module and folder in here."""

from ...modules import import_all

import_all(__name__, __path__)
