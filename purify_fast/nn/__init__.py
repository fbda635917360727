"""Building blocks: classifiers, the internal representation, the conditional autoencoder, purifiers."""

from .classifiers import CLASSIFIERS, FullyConnected, PreActResNet18, SmallCNN, WideResNet, build_classifier
from .controls import NoisyCopies
from .defence import Defence
from .discriminator import PatchDiscriminator, patch_depth
from .folding import fold_batchnorm
from .head import Head
from .inpainting import DeepFillGenerator
from .masked_autoencoder import VIT_B16, MaskedAutoencoder
from .packed_decoder import PackedDecoder
from .purifiers import PURIFIERS, Purifier, build_purifier
from .randomised import Randomised
from .representation import Representation
from .small_generator import SmallGenerator
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
    "PURIFIERS",
    "VIT_B16",
    "ConditionEncoder",
    "ConditionEncoderV1",
    "Decoder",
    "DecoderV1",
    "Deconvolution",
    "DeepFillGenerator",
    "Defence",
    "FrozenView",
    "FullyConnected",
    "Head",
    "MaskedAutoencoder",
    "NoisyCopies",
    "PackedDecoder",
    "PatchDiscriminator",
    "PosteriorEncoder",
    "PosteriorEncoderV1",
    "PreActResNet18",
    "Purifier",
    "Randomised",
    "Representation",
    "SmallCNN",
    "SmallGenerator",
    "WideResNet",
    "build_classifier",
    "build_purifier",
    "decoder_plan",
    "decoder_plan_v1",
    "fold_batchnorm",
    "patch_depth",
    "pre_encoder",
    "published_decoder",
]
