"""What every defence is made of: control over its randomness, aggregation, a frozen classifier behind a purifier."""

from .aggregation import WithAggregation
from .base import Defence
from .noisy_ensemble import NoisyEnsemble
from .stochastic import StochasticDefence

__all__ = ["Defence", "NoisyEnsemble", "StochasticDefence", "WithAggregation"]
