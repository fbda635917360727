"""Building blocks: classifiers, the internal representation, the conditional autoencoder."""

from .classifiers import SmallCNN
from .folding import fold_batchnorm
from .head import Head
from .randomised import Randomised
from .representation import Representation
from .vae import ConditionEncoder, Decoder, Deconvolution, PosteriorEncoder, decoder_plan, pre_encoder
from .view import FrozenView

__all__ = [
    "ConditionEncoder",
    "Decoder",
    "Deconvolution",
    "FrozenView",
    "Head",
    "PosteriorEncoder",
    "Randomised",
    "Representation",
    "SmallCNN",
    "decoder_plan",
    "fold_batchnorm",
    "pre_encoder",
]
