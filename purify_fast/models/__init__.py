"""Classifiers, the layers they are made of, and reading a classifier's internal representation."""

from .classifiers import CLASSIFIERS, FullyConnected, PreActResNet18, SmallCNN, build_classifier
from .representation import Representation
from .wide_resnet import WideResNet

__all__ = [
    "CLASSIFIERS",
    "FullyConnected",
    "PreActResNet18",
    "Representation",
    "SmallCNN",
    "WideResNet",
    "build_classifier",
]
