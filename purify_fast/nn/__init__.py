"""Building blocks: classifiers, the internal representation, the conditional autoencoder."""

from .classifiers import SmallCNN
from .controls import NoisyCopies
from .head import Head
from .randomised import Randomised
from .representation import Representation
from .vae import ConditionEncoder, Decoder, Deconvolution, PosteriorEncoder, decoder_plan, pre_encoder

__all__ = [
    "ConditionEncoder",
    "Decoder",
    "Deconvolution",
    "Head",
    "NoisyCopies",
    "PosteriorEncoder",
    "Randomised",
    "Representation",
    "SmallCNN",
    "decoder_plan",
    "pre_encoder",
]
