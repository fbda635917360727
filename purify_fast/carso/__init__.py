"""CARSO: the defence, its training, and how it is saved."""

from ..nn import Head
from .model import Carso
from .presets import PRESETS, Preset
from .saving import load, save
from .training import CarsoConfig, CarsoTask

__all__ = ["PRESETS", "Carso", "CarsoConfig", "CarsoTask", "Head", "Preset", "load", "save"]
