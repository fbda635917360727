"""``run.yaml``: the options of a run, written beside its log and read by ``--config``.

The file is one flat table with the names of the command line. ``command`` says what it is for, ``version`` which
release of this package wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .._version import __version__
from .command import Command

C = TypeVar("C")

RUN_FILE = "run.yaml"
#: The folder of a run's evaluation, in the folder of the run.
EVALUATION = "evaluation"


def number(text: str) -> float:
    """A number, or a fraction of two numbers such as ``8/255``; ValueError for any other text."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"must be a number or a fraction such as 8/255, got {text!r}") from error


def values(command: Any) -> dict[str, Any]:
    """The options of a command and of its configurations, as YAML holds them: text, numbers, lists."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            options |= values(value)
        elif field.name != "config":
            value = str(value) if isinstance(value, Path) else value
            options[field.name] = list(value) if isinstance(value, tuple) else value
    return options


def run_file(command: Command) -> str:
    """The text of a run's file."""
    left_out = {name for names in command.ignored_beside() for name in names}
    options = {name: value for name, value in values(command).items() if name not in left_out}
    facts = {"command": command.called, "version": __version__}
    head = f"# purify-fast {command.called} --config {RUN_FILE} repeats this run; options on the command line win.\n"
    return head + yaml.safe_dump(facts | options, sort_keys=False, allow_unicode=True)


def write_run_file(command: Command, folder: Path) -> None:
    """Write a run's file beside its log."""
    from .._files import write_text

    write_text(folder / RUN_FILE, run_file(command))


def ball_of_run(folder: Path) -> tuple[float, str] | None:
    """The radius and the norm that a run trained at; None if no file names them, or the run trained on clean images.

    Raises:
        ValueError: the run's file or checkpoint is damaged.
    """
    if (folder / RUN_FILE).is_file():
        options = read_run_file(folder / RUN_FILE)
    else:
        # a training that was begun in Python has only a checkpoint
        from ..training.checkpoint import last_checkpoint

        options = (last_checkpoint(folder) or {"facts": {}})["facts"]
    eps = number(str(options.get("eps", 0)))
    return (eps, str(options.get("norm", "linf"))) if eps > 0 else None


def read_run_file(path: Path) -> dict[str, Any]:
    """Read the table in a run's file, or in a file written by hand; ValueError if it is not YAML, or not a table."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    table = {} if table is None else table
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise ValueError(f"{path} must hold a table of options, such as `eps: 0.3`")
    return table


def options_of(path: Path, kind: type[Command]) -> dict[str, Any]:
    """Read the options of a command from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table, of another command, or holds a name that is no option.
    """
    name = kind.called
    options = {key.replace("-", "_"): value for key, value in read_run_file(path).items()}
    options.pop("version", None)
    command = options.pop("command", name)
    if command != name:
        raise ValueError(f"--config {path} was written by `purify-fast {command}`; this is `purify-fast {name}`")
    if unknown := options.keys() - values(kind()).keys():
        named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
        raise ValueError(f"--config {path} must hold options of `purify-fast {name}` alone, got {named}")
    return options


def with_options(config: C, options: dict[str, Any]) -> C:
    """A command or configuration with options in place of its own, also in the configurations that it holds.

    Args:
        config: gives the values of all other options.
        options: the values, as YAML holds them; a number may be a text such as "8/255".
    """
    hints, changed = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_options(value, options)
        elif field.name in options:
            changed[field.name] = _as_type(options[field.name], hints[field.name])
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def _as_type(value: Any, kind: Any) -> Any:
    """A value of YAML as a field of a type holds it; a value of another type stays for the configuration to refuse."""
    kinds = typing.get_args(kind)
    if type(None) in kinds:
        return None if value in (None, "None") else _as_type(value, kinds[0])
    if isinstance(value, list):
        return tuple(_as_type(one, kinds[0]) for one in value) if kinds else tuple(value)
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return number(value)
    return Path(str(value)) if kind is Path else value


def report_file(folder: Path, name: str) -> Path:
    """A file of a report, whose folder is given, or that of the run which was evaluated.

    Raises:
        FileNotFoundError: the folder holds no such file.
    """
    for path in (folder / name, folder / EVALUATION / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} holds no {name}: give the folder that `purify-fast evaluate` wrote to, which its last line names"
    )
