"""Base classes of defences, which control random draws, aggregate predictions, and freeze the classifier."""

from .base import Defence
from .stochastic import MajorityVote, NoisyEnsemble, StochasticDefence, WithAggregation, WithFixedNoise, WithoutNoise

__all__ = [
    "Defence",
    "MajorityVote",
    "NoisyEnsemble",
    "StochasticDefence",
    "WithAggregation",
    "WithFixedNoise",
    "WithoutNoise",
]
