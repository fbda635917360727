"""Classifiers, the layers they are made of, and reading a classifier's internal representation."""

from .classifiers import CLASSIFIERS, FullyConnected, SmallCNN, build_classifier
from .preact_resnet import PreActResNet18
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
