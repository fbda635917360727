"""The published systems by name: ``recipe("atop/cifar_rt2")`` gives the defence, the task and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arrest.recipes import RECIPES as ARREST
from .atop.recipes import RECIPES as ATOP
from .base import Recipe
from .carso.recipes import RECIPES as CARSO
from .diffusion.recipes import RECIPES as DIFFUSION

_BY_METHOD: dict[str, Mapping[str, Recipe]] = {"carso": CARSO, "atop": ATOP, "arrest": ARREST, "diffusion": DIFFUSION}
#: Every recipe by its whole name, such as "carso/cifar10".
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipes in _BY_METHOD.values() for recipe in recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """A published system: a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe`, or a `DiffusionRecipe`, which has no training.

    Args:
        name: name of the method and the system, such as "carso/cifar10".
        method: method of the recipe; its name may then be left out.

    Raises:
        ValueError: another name; the message lists all.
    """
    family = name.partition("/")[0] if method is None else method
    recipes, key = _BY_METHOD.get(family, {}), name.removeprefix(f"{family}/")
    if key not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes if method else RECIPES)}, got {name!r}")
    return recipes[key]
