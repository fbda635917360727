"""The methods by name, and their published systems.

``recipe("atop/cifar_rt2")`` returns a recipe for the defence and its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..defences.base import Defence
from ..training.task import Task
from .arrest.config import ArrestConfig
from .arrest.recipes import RECIPES as ARREST
from .arrest.task import ArrestTask
from .atop.config import AtopConfig
from .atop.defence import Atop
from .atop.recipes import RECIPES as ATOP
from .atop.task import AtopTask
from .carso.config import CarsoConfig
from .carso.defence import Carso
from .carso.recipes import RECIPES as CARSO
from .carso.task import CarsoTask
from .diffusion.config import DiffusionConfig
from .diffusion.defence import DiffusionPurifier
from .diffusion.recipes import RECIPES as DIFFUSION
from .diffusion.task import DiffusionTask
from .publication import Recipe


class Method(NamedTuple):
    """A method: training, settings, published systems, and the defence (without it, the method trains a classifier)."""

    task: type[Task]
    config: type[Any]
    recipes: Mapping[str, Recipe] = {}
    defence: type[Defence] | None = None


METHODS = {
    "carso": Method(CarsoTask, CarsoConfig, CARSO, Carso),
    "atop": Method(AtopTask, AtopConfig, ATOP, Atop),
    "arrest": Method(ArrestTask, ArrestConfig, ARREST),
    "diffusion": Method(DiffusionTask, DiffusionConfig, DIFFUSION, DiffusionPurifier),
}

#: All recipes by their whole names, such as "carso/cifar10".
RECIPES: dict[str, Recipe] = {recipe.name: recipe for method in METHODS.values() for recipe in method.recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """Return the recipe of a published system: a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe` or `DiffusionRecipe`.

    Args:
        name: name of the method and the system, such as "carso/cifar10". Others raise a ValueError, which lists all.
        method: name of the method, if ``name`` is the name of the system only.
    """
    family = name.partition("/")[0] if method is None else method
    recipes = METHODS[family].recipes if family in METHODS else {}
    key = name.removeprefix(f"{family}/")
    if key not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes if method else RECIPES)}, got {name!r}")
    return recipes[key]
