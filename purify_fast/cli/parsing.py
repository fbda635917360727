"""From the words of a command line to a command: recipes and ``--config`` give the defaults, options given here win."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tyro

from .._version import __version__
from . import config_file
from .command import Command
from .evaluate import Evaluate
from .option_types import option_types
from .training import FollowsRecipe

MARKERS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


def overlays() -> argparse.ArgumentParser:
    """Reads --version and the options that decide the defaults of the others, and leaves everything else."""
    parser = argparse.ArgumentParser(prog="purify-fast", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--official-code", "--official_code", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--version", action="version", version=f"purify-fast {__version__}")
    return parser


def _names(arguments: list[str]) -> set[str]:
    """The options among the words, by their names as fields."""
    flags = [word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")]
    return {name.removeprefix("no_") for name in flags} | set(flags)


def refuse_superseded(command: Command, given: set[str]) -> None:
    """ValueError if an option was given that another one makes meaningless.

    Args:
        command: the command with all of its options.
        given: the names of the options that were given.
    """
    for rule in command.superseded():
        if odd := [name for name in rule.names if name in given]:
            raise ValueError(rule.message.format(given=", ".join(odd)))


def cli(kind: Any, arguments: list[str], **options: Any) -> Any:
    """``tyro.cli`` with this command line's types.

    Args:
        kind: a command's class, or a union of several.
        arguments: the words to read.
        options: further arguments of ``tyro.cli``.
    """
    return tyro.cli(kind, args=arguments, config=MARKERS, registry=option_types(), **options)


def parse(kind: type[Command], arguments: list[str]) -> Command:
    """The command that the words describe.

    Args:
        kind: its class.
        arguments: the words behind its name.

    Raises:
        ValueError: a recipe or a file that cannot be used, or options that do not go together.
        OSError: the file cannot be read.
        SystemExit: words that are no options or values of this command, or ``--help``.
    """
    prog = f"purify-fast {kind.called}"
    options: dict[str, Any] = {}
    read = overlays()
    path = read.parse_known_args(arguments)[0].config
    in_file = {} if path is None else config_file.options_of(path, kind)
    file_words = config_file.words(in_file, kind)
    chosen = read.parse_known_args(file_words + arguments)[0].recipe
    if issubclass(kind, FollowsRecipe) and chosen not in (None, "None"):
        official_code = read.parse_known_args(file_words + arguments)[0].official_code
        options = {"default": kind.of_recipe(chosen, official_code)}
    if kind is Evaluate and chosen not in (None, "None") and "data" not in {*in_file, *_names(arguments)}:
        # a published system brings its data set
        arguments = ["--data", chosen, *arguments]
    if file_words:
        default = cli(kind, file_words, prog=f"{prog} --config {path}", **options)
        refuse_superseded(default, set(in_file))
        options = {"default": default}
    command = cli(kind, arguments, prog=prog, **options)
    refuse_superseded(command, _names(arguments))
    return command
