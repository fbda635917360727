"""Fused operations. The module of an op has its formula, its reference in PyTorch, and its public function."""

import types

from .aggregate import aggregate as aggregate
from .apgd_step import apgd_step as apgd_step
from .attack_loss import attack_loss as attack_loss
from .contextual_attention import contextual_attention as contextual_attention, key_validity as key_validity
from .decode_samples import decode_prior as decode_prior
from .diffusion_step import diffusion_step as diffusion_step
from .dispatch.choices import kernels_now as kernels_now
from .dispatch.registry import REGISTRY as REGISTRY, use_backend as use_backend
from .gated_elu import gated_elu as gated_elu
from .hyperplane_projection import hyperplane_projection as hyperplane_projection
from .noisy_replay import noisy_replay as noisy_replay
from .pgd_step import pgd_step as pgd_step
from .philox import Stream as Stream, philox as philox
from .random_transform import random_transform as random_transform
from .reconstruction_loss import reconstruction_loss as reconstruction_loss
from .representation_distance import representation_distance as representation_distance
from .sample_latent import sample_latent as sample_latent
from .square_proposal import square_proposal as square_proposal
from .stitch import stitch as stitch

__all__ = sorted(
    name for name, value in globals().items() if name[0] != "_" and not isinstance(value, types.ModuleType)
)
