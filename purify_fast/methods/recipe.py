"""A published training as data: every number with the place that it is from, and how well it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..training.config import FitConfig

#: How well a fact is known: read in the authors' code; read in the paper; told by others who read the paper or
#: implemented it again; worked out from facts of the other grades.
Grade = Literal["code", "paper", "second-hand", "inferred"]


@dataclass(frozen=True)
class Fact:
    """One number or choice of a published system.

    Args:
        value: as the paper states it, or as the authors' code surely means it.
        grade: how well it is known.
        source: file and line of the authors' code, or the section of the paper.
        official: what the authors' code does, where that is something else; None where it does the same.
    """

    value: Any
    grade: Grade
    source: str
    official: Any = None


@dataclass(frozen=True)
class Recipe:
    """All that a published training needs. Each method's subclass makes its objects from it.

    The keys of the facts begin with what they are for: ``data.``, ``classifier.``, ``defence.``, ``method.`` (fields of
    the method's config), ``attack.`` (fields of `purify_fast.training.TrainingAttack`), ``loop.`` (fields of
    `purify_fast.training.FitConfig`), ``start.`` and ``evaluation.``, which are told in words.

    Args:
        name: as `purify_fast.methods.recipes.recipe` takes it, such as "carso/cifar10".
        title: what was trained, in one line.
        facts: by key.
        not_reproduced: what this package does otherwise, a sentence each.
    """

    name: str
    title: str
    facts: Mapping[str, Fact]
    not_reproduced: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """A fact's value, by its key."""
        return self.facts[key].value

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, after they were resized."""
        return self["data.image_shape"]

    def part(self, prefix: str, official_code: bool = False) -> dict[str, Any]:
        """The facts of one part, by their names without it.

        Args:
            prefix: of the keys, such as "loop".
            official_code: take what the authors' code does where that differs.
        """
        return {
            key.removeprefix(f"{prefix}."): fact.official if official_code and fact.official is not None else fact.value
            for key, fact in self.facts.items()
            if key.startswith(f"{prefix}.")
        }

    def loop(self, official_code: bool = False) -> FitConfig:
        """Epochs, batches and augmentation.

        Args:
            official_code: reproduce what the authors' code does otherwise than it says or surely means.
        """
        return FitConfig(**self.part("loop", official_code))

    def __str__(self) -> str:
        """All facts with grades and sources, and what is not reproduced, as text."""
        rows: list[tuple[str, ...]] = [
            (key, _text(fact.value), "" if fact.official is None else _text(fact.official), fact.grade, fact.source)
            for key, fact in self.facts.items()
        ]
        rows.insert(0, ("fact", "value", "official_code=True", "grade", "source"))
        # a long text stands out of its column
        widths = [max(len(row[column]) for row in rows if len(row[column]) <= 32) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        lines = [f"{self.name}: {self.title}", "", *lines]
        if self.not_reproduced:
            lines += ["", "Not reproduced:", *(f"- {sentence}" for sentence in self.not_reproduced)]
        return "\n".join(lines)


def _text(value: Any) -> str:
    """A value as a card shows it."""
    if isinstance(value, tuple) and len(value) > 6:
        return f"{value[0]} ... {value[-1]} ({len(value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
