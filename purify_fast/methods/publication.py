"""Published systems: their facts with sources, and the trainings that they describe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from ..models.classifiers import build_classifier
from ..training.config import FitConfig

R = TypeVar("R", bound="Recipe")

#: The source of a fact. "code": the authors' code. "paper": the paper. "second-hand": a text or code of other people
#: who have read the paper. "inferred": a conclusion from facts of the other grades.
Grade = Literal["code", "paper", "second-hand", "inferred"]


@dataclass(frozen=True)
class Fact:
    """A published number or choice: ``value``, as the paper states or means it, or ``official``, if the code differs.

    ``grade`` is the kind of source, and ``source`` is file and line of the authors' code, or section of the paper.
    """

    value: Any
    grade: Grade
    source: str
    official: Any = None

    def of(self, official_code: bool) -> Any:
        """Return ``official`` if it is asked for and there is one, and otherwise ``value``."""
        return self.official if official_code and self.official is not None else self.value


@dataclass(frozen=True)
class Recipe:
    """The facts of a published system, from which a subclass for each method builds the system and its training.

    The prefix of a fact's key is a part of the system. Facts with ``method.`` are fields of the method's config, facts
    with ``attack.`` are fields of `purify_fast.training.TrainingAttack`, and facts with ``loop.`` are fields of
    `purify_fast.training.FitConfig`. Most facts with ``start.``, ``run.`` and ``evaluation.`` are descriptions in
    words.

    Args:
        name: name in `purify_fast.methods.recipes.recipe`, such as "carso/cifar10".
        title: description of the system in one line.
        facts: the facts by key.
        not_reproduced: differences between this package and the publication, one sentence each.
        own: the user's values, by the keys of the facts that they replace (`for_data`, `for_batch`).
    """

    #: The class of the method's config.
    settings: ClassVar[Any]

    name: str
    title: str
    facts: Mapping[str, Fact]
    not_reproduced: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """Return the value of a fact, or the user's own value."""
        return self.own[key] if key in self.own else self.facts[key].value

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the images, (C, H, W), after resizing."""
        return self["data.image_shape"]

    def part(self, prefix: str, official_code: bool = False) -> dict[str, Any]:
        """Return the facts whose keys begin with a prefix such as "loop", by their keys without the prefix."""
        return {
            key.removeprefix(f"{prefix}."): self.own.get(key, fact.of(official_code))
            for key, fact in self.facts.items()
            if key.startswith(f"{prefix}.")
        }

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

    # -- the user's own data -------------------------------------------------------------------------------------------

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
        return replace(self, own={**self.own, **own})

    def for_batch(self: R, batch_size: int) -> R:
        """Return this recipe for ``batch_size`` images per step of all processes. CARSO's learning rate is scaled."""
        return replace(self, own={**self.own, "loop.batch_size": batch_size})

    def __str__(self) -> str:
        """Return all facts with grades and sources, and the differences of this package, as text."""
        rows: list[tuple[str, ...]] = [("fact", "value", "official_code=True", "grade", "source")]
        for key, fact in self.facts.items():
            official = "" if fact.official is None else _text(fact.official)
            rows.append((key, _text(fact.value), official, fact.grade, fact.source))
        # The width of a column ignores long texts, because they would make the column too wide.
        widths = [max(len(row[column]) for row in rows if len(row[column]) <= 32) for column in range(4)]
        lines = [f"{self.name}: {self.title}", ""]
        lines += ["  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in rows]
        if self.not_reproduced:
            lines += ["", "Not reproduced:", *(f"- {sentence}" for sentence in self.not_reproduced)]
        return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        one = [_text(part) for part in value]
        return f"{one[0]} ... {one[-1]} ({len(one)})" if len(one) > 6 else f"({', '.join(one)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_recipes(kind: type[R], method: str) -> dict[str, R]:
    """Read ``recipes.json`` of a method. The keys of the result are the recipes' names without the method's name."""
    systems = json.loads((Path(__file__).parent / method / "recipes.json").read_text(encoding="utf-8"))
    recipes = {}
    for name, system in systems.items():
        facts = {key: Fact(_number(value), *rest) for key, (value, *rest) in system["facts"].items()}
        recipes[name] = kind(f"{method}/{name}", system["title"], facts, tuple(system["not_reproduced"]))
    return recipes


def _number(value: Any) -> Any:
    """Convert a value of the file: a fraction to a number, and a list to a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and value.replace("/", "", 1).isdigit():
        return float(Fraction(value))
    return value
