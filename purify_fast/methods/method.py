"""The methods by name, for the command line, `purify_fast.methods.recipes` and `purify_fast.load_defence`."""

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
