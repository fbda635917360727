"""The published systems of all methods.

``recipe("atop/cifar_rt2")`` returns a recipe for the defence and its training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from torch import nn

from ..models.classifiers import build_classifier
from ..training.config import FitConfig
from . import all_methods

R = TypeVar("R", bound="Recipe")


@dataclass(frozen=True)
class Recipe:
    """The values of a published system, from which a subclass for each method builds the system and its training.

    The method's file ``recipes.yaml`` has the values, and beside each value a comment with its grade and its source.
    The grade is the kind of source. "code": the authors' code. "paper": the paper. "second-hand": a text or code of
    other people who have read the paper. "inferred": a conclusion from facts of the other grades. The source is file
    and line of the authors' code, or section of the paper.

    The prefix of a value's key is a part of the system. Values with ``method.`` are fields of the method's config,
    values with ``attack.`` are fields of `purify_fast.training.TrainingAttack`, and values with ``loop.`` are fields of
    `purify_fast.training.FitConfig`. Most values with ``start.``, ``run.`` and ``evaluation.`` are descriptions in
    words, and ``not_reproduced`` are the differences between this package and the publication, one sentence each.

    Args:
        name: name in `purify_fast.methods.recipes.recipe`, such as "carso/cifar10".
        title: description of the system in one line.
        values: the values by key, as the paper states or means them.
        official: the values that differ in the authors' code.
    """

    #: The class of the method's config.
    settings: ClassVar[Any]
    #: The values that are in proportion to the number of images per step.
    in_proportion: ClassVar[tuple[str, ...]] = ()

    name: str
    title: str
    values: Mapping[str, Any]
    official: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """Return a value."""
        return self.values[key]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images, (C, H, W), after resizing."""
        return self["data.image_shape"]

    def part(self, prefix: str, official_code: bool = False) -> dict[str, Any]:
        """Return the values whose keys begin with a prefix such as "loop", by their keys without the prefix."""
        values = {**self.values, **(self.official if official_code else {})}
        start = f"{prefix}."
        return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}

    def config(self, official_code: bool = False) -> Any:
        """Return the settings of the training. ``official_code`` prefers the values in the authors' code."""
        attack = replace(self.settings.attack, **self.part("attack", official_code))
        return self.settings(attack=attack, **self.part("method", official_code))

    def loop(self, official_code: bool = False) -> FitConfig:
        """Return the settings of the training loop. ``official_code`` prefers the values in the authors' code."""
        return FitConfig(**self.part("loop", official_code))

    def build_classifier(self) -> nn.Module:
        """Build the system's classifier with fresh weights. A ValueError says that this package has no such network."""
        options, data = self.part("classifier"), self.part("data")
        if "mean" not in data:
            raise ValueError(f"{self.name} has no classifier of its own: give one that you have trained")
        name, statistics = options.pop("name"), {"mean": data["mean"], "std": data["std"]}
        return build_classifier(name, self.image_shape, data["num_classes"], **statistics, **options)

    def for_data(
        self: R,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> R:
        """Return this recipe for other data, with the authors' optimizer, schedule, attack and weights of the loss.

        Args:
            image_shape: (C, H, W) of the images.
            num_classes: number of classes.
            mean: mean of each channel, with which the networks normalize images (`purify_fast.data.statistics`). None
                means the recipe's mean, or 0.5 if the recipe has another number of channels.
            std: standard deviation of each channel, in the same form.
        """
        own = {"data.image_shape": tuple(image_shape), "data.num_classes": num_classes}
        for key, values in {"data.mean": mean, "data.std": std}.items():
            if values is not None or image_shape[0] != self.image_shape[0]:
                own[key] = (0.5,) * image_shape[0] if values is None else tuple(values)
        return replace(self, values={**self.values, **own})

    def for_batch(self: R, batch_size: int) -> R:
        """Return this recipe for ``batch_size`` images per step of all processes.

        The learning rates of CARSO and ARREST are scaled in proportion.
        """
        factor = batch_size / self["loop.batch_size"]
        own = {"loop.batch_size": batch_size, **{key: self[key] * factor for key in self.in_proportion}}
        return replace(self, values={**self.values, **own})

    def __str__(self) -> str:
        """Return all values as text, in the form of ``recipes.yaml``."""
        values = {"title": self.title, **self.values, "official_code": dict(self.official)}
        return yaml.safe_dump({self.name: values}, sort_keys=False, default_flow_style=None, width=120)


def read_recipes(kind: type[R], method: str) -> dict[str, R]:
    """Read ``recipes.yaml`` of a method. The keys of the result are the recipes' names without the method's name."""
    systems = yaml.safe_load((Path(__file__).parent / method / "recipes.yaml").read_text(encoding="utf-8"))
    recipes = {}
    for name, values in systems.items():
        title, official = values.pop("title"), values.pop("official_code", {})
        values = {key: _number(value) for key, value in values.items()}
        recipes[name] = kind(f"{method}/{name}", title, values, official)
    return recipes


def _number(value: Any) -> Any:
    """Convert a value of the file: a fraction such as 8/255 to a number, and a list to a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and value.replace("/", "", 1).isdigit():
        return float(Fraction(value))
    return value


# -- the published systems of all methods ------------------------------------------------------------------------------


@functools.cache
def all_recipes() -> dict[str, Recipe]:
    """Return all recipes by their whole names, such as "carso/cifar10"."""
    by_method = (import_module(f"{__package__}.{name}").RECIPES for name, kind in all_methods().items() if kind.recipes)
    return {recipe.name: recipe for recipes in by_method for recipe in recipes.values()}


def recipe(name: str, method: str | None = None) -> Any:
    """Return the recipe of a published system: a `CarsoRecipe`, `AtopRecipe`, `ArrestRecipe` or `DiffusionRecipe`.

    Args:
        name: name of the method and the system, such as "carso/cifar10". Others raise a ValueError, which lists all.
        method: name of the method, if ``name`` is the name of the system only.
    """
    start = "" if method is None else f"{method}/"
    recipes = {full.removeprefix(start): system for full, system in all_recipes().items() if full.startswith(start)}
    if (key := name.removeprefix(start)) not in recipes:
        raise ValueError(f"recipe must be one of {', '.join(recipes)}, got {name!r}")
    return recipes[key]
