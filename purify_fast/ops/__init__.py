"""Fused operations; each module holds one op: its formula, its reference, its contract."""

from .aggregate import aggregate
from .apgd_step import apgd_step
from .contextual_attention import contextual_attention, key_validity
from .convolution import conv2d
from .decode_samples import decode_prior, decode_samples
from .dispatch.pinning import choices_of_bits, kernel_choices, pin_kernels, resume_choices
from .dispatch.registry import REGISTRY, use_backend
from .gated_elu import gated_elu
from .hyperplane_projection import hyperplane_projection
from .noisy_replay import noisy_replay
from .pgd_step import pgd_step
from .philox import Stream, philox
from .random_transform import random_transform
from .reconstruction_loss import reconstruction_loss
from .representation_distance import representation_distance
from .sample_latent import sample_latent
from .square_proposal import square_proposal
from .stitch import stitch

__all__ = [
    "REGISTRY",
    "Stream",
    "aggregate",
    "apgd_step",
    "choices_of_bits",
    "contextual_attention",
    "conv2d",
    "decode_prior",
    "decode_samples",
    "gated_elu",
    "hyperplane_projection",
    "kernel_choices",
    "key_validity",
    "noisy_replay",
    "pgd_step",
    "philox",
    "pin_kernels",
    "random_transform",
    "reconstruction_loss",
    "representation_distance",
    "resume_choices",
    "sample_latent",
    "square_proposal",
    "stitch",
    "use_backend",
]
