"""CARSO (purification conditioned on the classifier's representation, arXiv 2306.06081): defence and training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_exports

if TYPE_CHECKING:
    from ...defences.stochastic import WithAggregation as WithAggregation
    from ...speed.decoding import PackedDecoder as PackedDecoder
    from .defence import Carso as Carso
    from .method import CarsoConfig as CarsoConfig
    from .networks import (
        Decoder as Decoder,
        Deconvolution as Deconvolution,
        decoder_plan as decoder_plan,
        published_decoder as published_decoder,
    )
    from .recipes import RECIPES as RECIPES, load_official as load_official, official_tensors as official_tensors
    from .task import CarsoTask as CarsoTask
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
