"""Classifiers, a denoiser, the layers they are made of, and reading a classifier's internal representation."""

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
