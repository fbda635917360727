"""The published systems by name: ``recipe("atop/cifar_rt2")`` returns a recipe for the defence and its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arrest.recipes import RECIPES as ARREST
from .atop.recipes import RECIPES as ATOP
from .carso.recipes import RECIPES as CARSO
from .diffusion.recipes import RECIPES as DIFFUSION
from .publication import Recipe

_BY_METHOD: dict[str, Mapping[str, Recipe]] = {"carso": CARSO, "atop": ATOP, "arrest": ARREST, "diffusion": DIFFUSION}
#: All recipes by their whole names, such as "carso/cifar10".
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipes in _BY_METHOD.values() for recipe in recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """Return the recipe of a published system.

    This is a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe` or `DiffusionRecipe`. A `DiffusionRecipe` has no training.

    Args:
        name: name of the method and the system, such as "carso/cifar10".
        method: name of the method, if ``name`` is the name of the system only.

    Raises:
        ValueError: there is no such recipe; the message lists all names.
    """
    family = name.partition("/")[0] if method is None else method
    recipes, key = _BY_METHOD.get(family, {}), name.removeprefix(f"{family}/")
    if key not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes if method else RECIPES)}, got {name!r}")
    return recipes[key]
