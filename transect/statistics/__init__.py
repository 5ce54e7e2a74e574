"""Streaming statistics over calibration data: declared by methods, collected once, shared by all."""

from .collect import Fisher, Progress, Recorder, collect, key_of
from .kinds import (
    BlockSimilarity,
    ExpertLoad,
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
from .store import Statistics

__all__ = [
    "BlockSimilarity", "ExpertLoad", "FeatureNorm", "Fisher", "FisherDiagonal", "HeadContribution", "InputCovariance",
    "InputMean", "OutputGradientCovariance", "Progress", "Recorder", "Statistic", "Statistics", "SublayerSimilarity",
    "Trace", "collect", "key_of",
]  # fmt: skip
