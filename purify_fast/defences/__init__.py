"""Base classes of defences, which control random draws, aggregate predictions, and freeze the classifier."""

from .base import Defence
from .stochastic import NoisyEnsemble, StochasticDefence, WithAggregation
from .voting import MajorityVote

__all__ = ["Defence", "MajorityVote", "NoisyEnsemble", "StochasticDefence", "WithAggregation"]
