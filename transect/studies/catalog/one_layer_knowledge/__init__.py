"""When facts learned in pretraining can still be asked for after fine-tuning on questions: one layer, a known world."""

from . import study  # noqa: F401 - importing it registers it
