"""Building blocks: classifiers, the internal representation, the conditional autoencoder."""

from .classifiers import CLASSIFIERS, FullyConnected, PreActResNet18, SmallCNN, WideResNet, build_classifier
from .controls import NoisyCopies
from .folding import fold_batchnorm
from .head import Head
from .randomised import Randomised
from .representation import Representation
from .vae import (
    ConditionEncoder,
    Decoder,
    Deconvolution,
    PosteriorEncoder,
    decoder_plan,
    pre_encoder,
    published_decoder,
)
from .vae_v1 import ConditionEncoderV1, DecoderV1, PosteriorEncoderV1, decoder_plan_v1
from .view import FrozenView

__all__ = [
    "CLASSIFIERS",
    "ConditionEncoder",
    "ConditionEncoderV1",
    "Decoder",
    "DecoderV1",
    "Deconvolution",
    "FrozenView",
    "FullyConnected",
    "Head",
    "NoisyCopies",
    "PosteriorEncoder",
    "PosteriorEncoderV1",
    "PreActResNet18",
    "Randomised",
    "Representation",
    "SmallCNN",
    "WideResNet",
    "build_classifier",
    "decoder_plan",
    "decoder_plan_v1",
    "fold_batchnorm",
    "pre_encoder",
    "published_decoder",
]
