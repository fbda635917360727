"""The published systems by name: ``recipe("atop/cifar_rt2")`` returns a recipe for the defence and its training."""

from __future__ import annotations

from typing import Any

from .method import METHODS
from .publication import Recipe

#: All recipes by their whole names, such as "carso/cifar10".
RECIPES: dict[str, Recipe] = {recipe.name: recipe for method in METHODS.values() for recipe in method.recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """Return the recipe of a published system: a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe` or `DiffusionRecipe`.

    Args:
        name: name of the method and the system, such as "carso/cifar10".
        method: name of the method, if ``name`` is the name of the system only.

    Raises:
        ValueError: there is no such recipe; the message lists all names.
    """
    family = name.partition("/")[0] if method is None else method
    recipes = METHODS[family].recipes if family in METHODS else {}
    key = name.removeprefix(f"{family}/")
    if key not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes if method else RECIPES)}, got {name!r}")
    return recipes[key]
