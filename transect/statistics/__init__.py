"""Streaming statistics over calibration data: declared by methods, collected once, shared by all."""

from .collect import Fisher, Progress, Recorder, collect, key_of
from .kinds import (
    BlockSimilarity,
    FeatureNorm,
    FisherDiagonal,
    HeadContribution,
    InputCovariance,
    InputMean,
    OutputGradientCovariance,
    Statistic,
    SublayerSimilarity,
    Trace,
)
from .objective import Batch, predictions, summed_loss, task_of
from .store import Statistics

__all__ = [
    "Batch", "BlockSimilarity", "FeatureNorm", "Fisher", "FisherDiagonal", "HeadContribution", "InputCovariance",
    "InputMean", "OutputGradientCovariance", "Progress", "Recorder", "Statistic", "Statistics", "SublayerSimilarity",
    "Trace", "collect", "key_of", "predictions", "summed_loss", "task_of",
]  # fmt: skip
