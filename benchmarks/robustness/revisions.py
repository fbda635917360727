"""Describe the attacks of a protocol by their options and revisions.

A row of a results file stores the description of the attacks that made the row. If the description differs from that of
the present attacks, the row is outdated. So outdated rows are found without running the attacks again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from purify_fast.attacks.base import ThreatModel
from purify_fast.judge.request.deadline import Subject
from purify_fast.judge.request.preparation import AttackSpec, protocol_attacks
from purify_fast.judge.run import measure as stopping
from purify_fast.methods.diffusion import DiffusionPurifier

#: The versions of the rule for random models, of the probes of random models, of the draws of models that promise
#: other draws for each image, and of the surrogates. Increase a number if results change by it.
RULE, PROBES, DRAWS, SURROGATES = 2, 2, 2, 2


class AnyModel(nn.Module):
    """A classifier of ten classes. `of_protocol` uses it to find out which attacks a protocol runs.

    Args:
        random: True if two predictions of the same image differ.
    """

    def __init__(self, random: bool):
        super().__init__()
        self.random = random
        self.weight = nn.Parameter(torch.linspace(-1, 1, 640).view(10, 64))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, 10]``.

        Args:
            x: images ``[B, 1, 8, 8]``.
        """
        logits = x.flatten(1) @ self.weight.T
        return logits + torch.rand_like(logits) if self.random else logits


class AnyPurifier(AnyModel):
    """`AnyModel` with the attacks that the protocol "strong" adds for a purifier by diffusion."""

    strong_attacks: Any = DiffusionPurifier.strong_attacks


def of_attacks(specs: Iterable[AttackSpec], random: bool = True) -> list[str]:
    """Return a description of each attack: its label, options and revision, and the rules that select its images.

    Args:
        specs: specifications of the attacks with their final options.
        random: True for a random model, for which a single group of the nearest images is attacked.
    """
    words = []
    for spec in specs:
        attack = spec.attack
        until = "" if spec.until is None else f" until {spec.until} by rule {stopping.REVISION}"
        groups = "" if random else f" in groups by rule {stopping.NEAREST_REVISION}"
        nearest = "" if spec.nearest is None else f" {spec.nearest} nearest{groups}"
        # The saved results call the original implementation AutoAttack.
        options = repr(attack).removeprefix("Original")
        words.append(f"{spec.label or ''} {options} {attack.revision()}{until}{nearest}".strip())
    return words


def of_protocol(
    name: str, random: bool, diffusion: bool = False, change: Callable[[AttackSpec], AttackSpec] = lambda spec: spec
) -> list[str]:
    """Return the descriptions of the attacks that a protocol runs on every model.

    Args:
        name: name of the protocol.
        random: True if two predictions of the model differ.
        diffusion: True for a purifier by diffusion.
        change: function that changes the options of each attack before the attack is described.
    """
    x, y = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    with torch.random.fork_rng([]):
        model = AnyPurifier(random) if diffusion else AnyModel(random)
        subject = Subject(model, x, y, batch_size=2, n_eval=2, seed=0)
        specs = protocol_attacks(name, subject, ThreatModel("linf", 0.1))
    # These protocols may attack through surrogates of the model, so the result includes the surrogates' revision.
    surrogates = name == "strong" or (name == "standard" and random)
    return of_attacks(map(change, specs), random) + ([f"surrogates {SURROGATES}"] if surrogates else [])


@functools.cache
def short(name: str, random: bool, diffusion: bool = False) -> str:
    """Return a short hash of the result of `of_protocol` for the same arguments, and of the rule for random models."""
    words = of_protocol(name, random, diffusion) + of_rule(random)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def of_rule(random: bool, probes: bool = True, promised: bool = True) -> list[str]:
    """Return what decides how `evaluate` judges a random model; empty for a deterministic model.

    Args:
        random: True for a random model.
        probes: True if probes come before the attacks.
        promised: True if the model's class promises other draws for each image.
    """
    return [f"rule {RULE}"] + [f"probes {PROBES}"] * probes + [f"draws {DRAWS}"] * promised if random else []
