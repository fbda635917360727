"""CARSO: the defence, its training, and how it is saved."""

from ..nn import Head
from .model import Carso
from .saving import load, save
from .training import CarsoConfig, CarsoTask

__all__ = ["Carso", "CarsoConfig", "CarsoTask", "Head", "load", "save"]
