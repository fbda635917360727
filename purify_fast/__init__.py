"""Fast, honest adversarial purification for PyTorch."""

from . import ops

__version__ = "0.1.0"
__all__ = ["ops"]
