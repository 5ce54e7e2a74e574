"""The errors that a user can cause and mend; the command line prints them without a traceback."""


class TransectError(ValueError):
    """Something that the caller asked for cannot be done; the message says what came and what was expected."""


class UnknownArchitecture(TransectError):
    """The model's architecture has no definition yet."""


class WrongDescription(TransectError):
    """A description of an architecture is not true of the model; the message names what fails and where to look."""


class BadCheckpoint(TransectError):
    """A model folder is incomplete, damaged or does not fit its own description."""


class BadData(TransectError):
    """Calibration or evaluation data is missing, empty or unreadable."""


class OutOfReach(TransectError):
    """A method has no result as small as the budget asks for, on this model."""


class NotApplicable(TransectError):
    """A claim, probe or edit means nothing for this model or data; the message is the reason."""


class Diverged(TransectError):
    """A training whose loss is not finite any more."""
