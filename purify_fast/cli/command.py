"""What the commands have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .._validation import check_types


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

    #: how it is called, as in ``train carso``
    called: ClassVar[str]

    config: Path | None = None
    """The run.yaml of an earlier run. It gives this command's defaults; options on the command line win over them."""

    def __post_init__(self) -> None:
        check_types(self)

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for."""

    def writes(self) -> Path | None:
        """The folder that the command writes, in which no other run may write meanwhile; None for none."""
        return getattr(self, "out", None)

    def superseded(self) -> list[Superseded]:
        """The options that others of this command's options make meaningless."""
        return []
