"""Classifiers, the layers they are made of, and reading a classifier's internal representation."""

from .classifiers import CLASSIFIERS, FullyConnected, PreActResNet18, SmallCNN, WideResNet, build_classifier
from .representation import Representation

__all__ = [
    "CLASSIFIERS",
    "FullyConnected",
    "PreActResNet18",
    "Representation",
    "SmallCNN",
    "WideResNet",
    "build_classifier",
]
