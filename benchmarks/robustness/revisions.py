"""A protocol's attacks with options and revisions, on which its rows depend besides model and images.

A results file keeps these with its rows, so that outdated rows are found without making them again.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor, nn

from purify_fast.attacks import Attack
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import stopping
from purify_fast.evaluation.attack_lists import protocol_attacks
from purify_fast.evaluation.softening import REVISION
from purify_fast.evaluation.specs import AttackSpec
from purify_fast.evaluation.subject import Subject
from purify_fast.methods.diffusion.own_attacks import strong_attacks


class AnyModel(nn.Module):
    """A classifier of ten classes, to list the attacks that a protocol runs on every model.

    Args:
        random: whether two predictions differ.
    """

    def __init__(self, random: bool):
        super().__init__()
        self.random = random
        self.weight = nn.Parameter(torch.linspace(-1, 1, 640).view(10, 64))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]``.

        Args:
            x: images ``[B, 1, 8, 8]``.
        """
        logits = x.flatten(1) @ self.weight.T
        return logits + torch.rand_like(logits) if self.random else logits


class AnyPurifier(AnyModel):
    """The same classifier as a purifier by diffusion, for which "strong" adds attacks."""

    def strong_attacks(self, norm: str, eps: float) -> list[AttackSpec]:
        """The added attacks; the arguments are those of `DiffusionPurifier.strong_attacks`."""
        return strong_attacks(self, norm, eps)


def of_attacks(attacks: list[tuple[AttackSpec, Attack]]) -> list[str]:
    """Each attack in words: its label, options and revision, and the images that it searches.

    Args:
        attacks: specification of each attack, and the attack with its final options.
    """
    words = []
    for spec, attack in attacks:
        until = "" if spec.until is None else f" until {spec.until} by rule {stopping.REVISION}"
        nearest = "" if spec.nearest is None else f" {spec.nearest} nearest"
        words.append(f"{spec.label or ''} {attack!r} {attack.revision()}{until}{nearest}".strip())
    return words


def of_protocol(name: str, random: bool, diffusion: bool = False) -> list[str]:
    """The attacks of a protocol on any model.

    Args:
        name: name of the protocol.
        random: whether two predictions of the model differ.
        diffusion: whether it is a purifier by diffusion.
    """
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    with torch.random.fork_rng([]):
        model = AnyPurifier(random) if diffusion else AnyModel(random)
        subject = Subject(model, x, y, batch_size=2, n_eval=2, seed=0)
        specs = protocol_attacks(name, subject, ThreatModel("linf", 0.1))
    return of_attacks([(spec, spec.resolved) for spec in specs]) + added(name, random)


def added(name: str, random: bool) -> list[str]:
    """The revision of surrogates, for a protocol that may add attacks through a model's surrogates.

    Args:
        name: name of the protocol.
        random: whether two predictions of the model differ.
    """
    return [f"surrogates {REVISION}"] if name == "strong" or (name == "standard" and random) else []


@functools.cache
def short(name: str, random: bool, diffusion: bool = False) -> str:
    """A short hash of `of_protocol`, with its arguments."""
    return hashlib.sha256("\n".join(of_protocol(name, random, diffusion)).encode()).hexdigest()[:8]
