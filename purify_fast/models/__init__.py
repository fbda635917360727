"""Classifiers, a denoiser and their layers, and a reader for the outputs of a classifier's inner layers."""

from .classifiers import (
    CLASSIFIERS as CLASSIFIERS,
    PreActResNet18 as PreActResNet18,
    SmallCNN as SmallCNN,
    WideResNet as WideResNet,
    build_classifier as build_classifier,
)
from .layers import Representation as Representation
from .unet import UNet as UNet
