"""CARSO: the defence, its training, and how it is saved."""

from ..nn import Head
from .layers import LayerScore, rank_layers
from .model import Carso
from .saving import load, save
from .training import CarsoConfig, CarsoTask

__all__ = ["Carso", "CarsoConfig", "CarsoTask", "Head", "LayerScore", "load", "rank_layers", "save"]
