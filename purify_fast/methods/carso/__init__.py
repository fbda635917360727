"""CARSO: the defence, its training, and how it is saved."""

from ...defences.aggregation import Head
from .config import CarsoConfig
from .defence import Carso
from .layer_ranking import LayerScore, rank_layers
from .networks import Decoder, Deconvolution, decoder_plan, published_decoder
from .packed_decoder import PackedDecoder
from .presets import PRESETS, Preset
from .saving import load
from .task import CarsoTask

__all__ = [
    "PRESETS",
    "Carso",
    "CarsoConfig",
    "CarsoTask",
    "Decoder",
    "Deconvolution",
    "Head",
    "LayerScore",
    "PackedDecoder",
    "Preset",
    "decoder_plan",
    "load",
    "published_decoder",
    "rank_layers",
]
