"""CARSO: the defence, its training, and how it is saved."""

from ..nn import Head
from .layers import LayerScore, rank_layers
from .model import Carso
from .presets import PRESETS, Preset
from .saving import load
from .training import CarsoConfig, CarsoTask

__all__ = [
    "PRESETS",
    "Carso",
    "CarsoConfig",
    "CarsoTask",
    "Head",
    "LayerScore",
    "Preset",
    "load",
    "rank_layers",
]
