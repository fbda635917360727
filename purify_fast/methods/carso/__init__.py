"""CARSO: the defence, its training, and how it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from ...defences.aggregation import Head as Head
    from .config import CarsoConfig as CarsoConfig
    from .defence import Carso as Carso
    from .layer_ranking import LayerScore as LayerScore
    from .layer_ranking import rank_layers as rank_layers
    from .networks import Decoder as Decoder
    from .networks import Deconvolution as Deconvolution
    from .networks import decoder_plan as decoder_plan
    from .networks import published_decoder as published_decoder
    from .packed_decoder import PackedDecoder as PackedDecoder
    from .presets import PRESETS as PRESETS
    from .presets import Preset as Preset
    from .saving import load as load
    from .task import CarsoTask as CarsoTask

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
__getattr__, __dir__ = lazy_exports(
    __name__,
    PRESETS=".presets",
    Carso=".defence",
    CarsoConfig=".config",
    CarsoTask=".task",
    Decoder=".networks",
    Deconvolution=".networks",
    Head="...defences.aggregation",
    LayerScore=".layer_ranking",
    PackedDecoder=".packed_decoder",
    Preset=".presets",
    decoder_plan=".networks",
    load=".saving",
    published_decoder=".networks",
    rank_layers=".layer_ranking",
)
