"""The published systems of all methods.

``recipe("atop/cifar_rt2")`` returns a recipe for the defence and its training.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .discovery import METHODS
from .publication import Recipe

#: The recipes of each method that has any, by the method's name and the recipe's name within the method.
_BY_METHOD: dict[str, dict[str, Recipe]] = {
    name: import_module(f"{__package__}.{name}.recipes").RECIPES for name, method in METHODS.items() if method.recipes
}
#: All recipes by their whole names, such as "carso/cifar10".
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipes in _BY_METHOD.values() for recipe in recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """Return the recipe of a published system: a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe` or `DiffusionRecipe`.

    Args:
        name: name of the method and the system, such as "carso/cifar10". Others raise a ValueError, which lists all.
        method: name of the method, if ``name`` is the name of the system only.
    """
    family = name.partition("/")[0] if method is None else method
    recipes = _BY_METHOD.get(family, {})
    key = name.removeprefix(f"{family}/")
    if key not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes if method else RECIPES)}, got {name!r}")
    return recipes[key]
