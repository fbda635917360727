"""What the commands have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Superseded:
    """Options that do not go with another one, which brings what they would set.

    Args:
        names: the options' names as fields.
        message: what to say when one is given; ``{given}`` in it stands for the names of those that were.
    """

    names: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class Command(ABC):
    """A command: its fields are its options."""

    config: Path | None = None
    """A run.yaml, which every run writes beside its log. Its options become this command's; those given here win."""

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for."""

    def superseded(self) -> list[Superseded]:
        """The options that others of this command's options make meaningless."""
        return []
