"""Classifiers, a denoiser and their layers, and a reader for the outputs of a classifier's inner layers."""

from .classifiers import CLASSIFIERS, FullyConnected, PreActResNet18, SmallCNN, WideResNet, build_classifier
from .representation import Representation
from .unet import UNet

__all__ = [
    "CLASSIFIERS",
    "FullyConnected",
    "PreActResNet18",
    "Representation",
    "SmallCNN",
    "UNet",
    "WideResNet",
    "build_classifier",
]
