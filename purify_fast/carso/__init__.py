"""CARSO: the defence, its training, and how it is saved."""

from .model import Carso, Head
from .saving import load, save
from .training import CarsoConfig, CarsoTask

__all__ = ["Carso", "CarsoConfig", "CarsoTask", "Head", "load", "save"]
