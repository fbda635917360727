"""Base classes of defences, which control random draws, aggregate predictions, and freeze the classifier."""

from .base import Defence
from .modes import WithFixedNoise, WithoutNoise
from .noisy_ensemble import NoisyEnsemble
from .stochastic import StochasticDefence
from .wrappers import MajorityVote, WithAggregation

__all__ = [
    "Defence",
    "MajorityVote",
    "NoisyEnsemble",
    "StochasticDefence",
    "WithAggregation",
    "WithFixedNoise",
    "WithoutNoise",
]
