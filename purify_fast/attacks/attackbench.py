"""Adapts the attacks of purify_fast to AttackBench (Cina et al., AAAI 2025), the package attackbenchlib.

AttackBench counts the queries of each image at the model's input, and stops an attack after a budget of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..protocols import Classifier
from .arguments import check_eps
from .base import Attack, EngineAttack
from .context import AttackContext
from .sequence import AttackSequence


def for_attackbench(*attacks: Attack, eps: float) -> Callable[..., Tensor]:
    """Make an attack for ``attackbench.run_attack`` from attacks of this package.

    Several attacks run one after the other, and each attacks only the images that no earlier attack has fooled. The
    gradients are always those of the model itself, because AttackBench cannot count the queries of a copy.

    Args:
        *attacks: attacks of `purify_fast.attacks`, such as ``APGD()``, that support the norm that AttackBench sets.
        eps: radius in image units; ``run_attack(..., epsilon=...)`` overrides it.

    Returns:
        The attack ``(model, inputs, labels, targets, targeted, threat_model, epsilon, seed)``, which returns
        adversarial images. It raises ValueError for ``targeted=True``, for given ``targets`` and for the norm l0.

    Raises:
        ValueError: no attack, an attack with a radius of its own, or an eps that is not allowed.
    """
    if not attacks:
        raise ValueError("attacks must contain at least one attack, such as APGD(), got none")
    if fixed := [attack.kind for attack in attacks if getattr(attack, "eps", None) is not None]:
        raise ValueError(
            f"attacks must not set eps, got eps in {', '.join(fixed)}: give eps to for_attackbench instead"
        )
    check_eps(eps, None)
    plain = [replace(attack, precision="float32") if isinstance(attack, EngineAttack) else attack for attack in attacks]

    def attack(
        model: Classifier,
        inputs: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        targeted: bool = False,
        threat_model: str = "linf",
        epsilon: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        if targeted or targets is not None:
            raise ValueError(
                f"targeted must be False and targets must be None, got targeted={targeted} and targets "
                f"{'None' if targets is None else 'with classes'}: leave both out, any wrong class is a success here"
            )
        radius = eps if epsilon is None else epsilon
        context = AttackContext(eps=radius, norm=threat_model, draws_differ=False, seed=seed)  # type: ignore[arg-type]
        attacked = AttackSequence(model, inputs, labels, context)
        for one in plain:
            attacked.run(one)
        return attacked.images

    # AttackBench reads these attributes to name its results.
    attack.__name__ = attack._attackbench_name = "-".join(one.kind for one in attacks)  # type: ignore[attr-defined]
    attack._attackbench_lib = "purify_fast"  # type: ignore[attr-defined]
    return attack
