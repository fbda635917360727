"""What every defence is made of: control over its randomness, aggregation, a frozen classifier behind a purifier."""

from .aggregation import Head
from .base import Defence
from .noisy_ensemble import NoisyCopies
from .stochastic import Randomised

__all__ = ["Defence", "Head", "NoisyCopies", "Randomised"]
