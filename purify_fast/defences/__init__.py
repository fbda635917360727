"""Base classes of defences, which control random draws, aggregate predictions, and freeze the classifier."""

from .base import Defence
from .modes import MajorityVote, NoisyEnsemble, WithAggregation, WithFixedNoise, WithoutNoise
from .stochastic import StochasticDefence

__all__ = [
    "Defence",
    "MajorityVote",
    "NoisyEnsemble",
    "StochasticDefence",
    "WithAggregation",
    "WithFixedNoise",
    "WithoutNoise",
]
