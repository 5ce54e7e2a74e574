"""Small trainings that answer a question about trained models: each trains its own, and reports like a probe."""

from . import catalog  # noqa: F401 - importing one registers it
from .registry import Bench, Study, studies, study_named, studying
from .run import KIND, run_study

__all__ = ["KIND", "Bench", "Study", "run_study", "studies", "study_named", "studying"]
