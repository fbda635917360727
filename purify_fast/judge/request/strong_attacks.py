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
    return [MAKERS[item[0]](**item[1]) if isinstance(item, tuple) else item for item in given]
