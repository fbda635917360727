"""Fused operations; each module holds one op: its formula, its reference, its contract."""

from ._op import REGISTRY, use_backend
from .aggregate import aggregate
from .apgd_step import apgd_step
from .decode_samples import decode_samples
from .pgd_step import pgd_step
from .philox import Stream, philox
from .reconstruction_loss import reconstruction_loss
from .sample_latent import sample_latent

__all__ = [
    "REGISTRY",
    "Stream",
    "aggregate",
    "apgd_step",
    "decode_samples",
    "pgd_step",
    "philox",
    "reconstruction_loss",
    "sample_latent",
    "use_backend",
]
