"""The published trainings by name: ``recipe("atop/cifar_rt2")`` gives the defence, the task and the loop."""

from __future__ import annotations

from .arrest.recipes import RECIPES as ARREST
from .arrest.recipes import ArrestRecipe
from .atop.recipes import RECIPES as ATOP
from .atop.recipes import AtopRecipe
from .carso.recipes import RECIPES as CARSO
from .carso.recipes import CarsoRecipe

#: Every recipe by its whole name, such as "carso/cifar10".
RECIPES: dict[str, CarsoRecipe | AtopRecipe | ArrestRecipe] = {
    made.name: made for recipes in (CARSO, ATOP, ARREST) for made in recipes.values()
}


def recipe(name: str) -> CarsoRecipe | AtopRecipe | ArrestRecipe:
    """A published training.

    Args:
        name: of the method and the system, such as "carso/cifar10".

    Raises:
        ValueError: another name; the message lists all.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
