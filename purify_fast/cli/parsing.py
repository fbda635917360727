"""Makes a command from the words of a command line, with tyro. Numbers may be fractions: ``--eps 8/255``.

A recipe and the file ``--config`` change the defaults of the options, but not options on the command line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from .._version import __version__
from .command import Command
from .run_file import flag, number, options_of, with_options, without_effect

C = TypeVar("C", bound=Command)

MARKERS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


def _fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not float:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


#: The rules of this module, for ``tyro.cli(registry=...)``.
OPTION_TYPES = ConstructorRegistry()
OPTION_TYPES.primitive_rule(_fractions)


def cli(kind: Any, arguments: list[str], **options: Any) -> Any:
    """Call ``tyro.cli`` with the rules of this module, for the class of a command or a union of classes."""
    return tyro.cli(kind, args=arguments, config=MARKERS, registry=OPTION_TYPES, **options)


def early_options() -> argparse.ArgumentParser:
    """A parser of --version, and of the options that decide the defaults of other options."""
    parser = argparse.ArgumentParser(prog="purify-fast", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--batch-size", "--batch_size")
    parser.add_argument("--official-code", "--official_code", action=argparse.BooleanOptionalAction)
    parser.add_argument("--version", action="version", version=f"purify-fast {__version__}")
    return parser


def _names(arguments: list[str]) -> set[str]:
    """The names of the options among the words, in the form of field names."""
    flags = {word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    return flags | {name.removeprefix("no_") for name in flags}


def parse(kind: type[C], arguments: list[str]) -> C:
    """Make a command of a class from the words after the command's name."""
    early, given = early_options().parse_known_args(arguments)[0], _names(arguments)
    in_file = {} if early.config is None else options_of(early.config, kind)
    # The values of the file win over those of the recipe, and the command line wins over both.
    chosen = {**in_file, **{name: value for name, value in vars(early).items() if value is not None}}
    if chosen.get("recipe") in (None, "None"):
        default = kind()
    else:
        size = str(chosen.get("batch_size"))
        # The configuration refuses any other text.
        batch_size = int(size) if size.isdecimal() and int(size) > 0 else None
        default = kind.of_recipe(chosen["recipe"], bool(chosen.get("official_code")), batch_size)
    command: C = cli(kind, arguments, prog=f"purify-fast {kind.called}", default=with_options(default, in_file))
    for name, reason in without_effect(command).items():
        if name in given:
            raise ValueError(f"{flag(name)} has no effect {reason}")
    return command
