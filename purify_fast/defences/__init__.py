"""Base classes of defences: control of random draws, aggregation, and a frozen classifier behind a purifier."""

from .base import Defence
from .stochastic import NoisyEnsemble, StochasticDefence, WithAggregation
from .voting import MajorityVote

__all__ = ["Defence", "MajorityVote", "NoisyEnsemble", "StochasticDefence", "WithAggregation"]
