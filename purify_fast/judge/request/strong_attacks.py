"""The attacks that the protocol "strong" adds for a model that has attacks of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ...protocols import OwnAttacks, supports
from .specs import AttackSpec, lee_kim_2023

#: The names that a model may give in place of an `AttackSpec`, because what trains does not import what judges.
MAKERS: dict[str, Callable[..., AttackSpec]] = {"AttackSpec": AttackSpec, "lee_kim_2023": lee_kim_2023}


def strong_attacks(model: Any, norm: str, eps: float) -> list[AttackSpec] | None:
    """Return the attacks that the protocol "strong" adds for a model; None if the model has none of its own."""
    if not supports(model, OwnAttacks):
        return None
    given = cast(OwnAttacks, model).strong_attacks(norm, eps)
    if odd := [item for item in given if not isinstance(item, AttackSpec) and item[0] not in MAKERS]:
        pairs = f"pairs of {' or '.join(MAKERS)} and its arguments"
        raise ValueError(
            f"strong_attacks of {type(model).__name__} must return AttackSpecs, or {pairs}, got {odd[0]!r}"
        )
    return [item if isinstance(item, AttackSpec) else MAKERS[item[0]](**item[1]) for item in given]
