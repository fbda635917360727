"""``run.yaml``: the options of a run, written beside its log and read by ``--config``.

The file is one flat table with the names of the command line. ``command`` says what it is for, ``version`` which
release of this package wrote it.
"""

from __future__ import annotations

import dataclasses
import shlex
import typing
from pathlib import Path
from typing import Any

import tyro
import yaml

from .._version import __version__
from .command import Command, DataCommand

RUN_FILE = "run.yaml"


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


def repeating(command: DataCommand) -> str:
    """The command line that repeats a command: the words that were typed, and what they leave to the environment.

    If the options are in a file, or the command was not typed, the line has its folder and every option that is not
    the default.
    """
    if command.typed and not any(word.split("=")[0] == "--config" for word in command.typed):
        line, data, root = ["purify-fast", *command.typed], *(getattr(command, of) for of in ("data", "data_root"))
        given = any(word.split("=")[0].replace("_", "-") == "--data-root" for word in command.typed)
        # PURIFY_FAST_DATA may be another one, or none, where the line is pasted.
        looked_for = data != "digits" and not Path(data).exists() and root is not None
        return shlex.join([*line, "--data-root", str(root)] if looked_for and not given else line)
    usual = values(type(command)())
    changed = {name: value for name, value in values(command).items() if name == "folder" or value != usual[name]}
    return shlex.join(["purify-fast", command.called, *words(changed, type(command))])


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
        ValueError: it is not a table, or of another command.
    """
    name = kind.called
    options = {key.replace("-", "_"): value for key, value in read_run_file(path).items()}
    options.pop("version", None)
    command = options.pop("command", name)
    if command != name:
        raise ValueError(f"--config {path} was written by `purify-fast {command}`; this is `purify-fast {name}`")
    return options


def words(options: dict[str, Any], kind: type) -> list[str]:
    """Options, as `options_of` returns them, as the words of a command line, so that both are read alike."""
    hints = typing.get_type_hints(kind, include_extras=True)
    positional = [name for name in options if tyro.conf.Positional in getattr(hints.get(name), "__metadata__", ())]
    line = [str(options[name]) for name in positional]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name in positional:
            continue
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif str(value).startswith("-"):
            line.append(f"--{flag}={value}")
        else:
            line += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return line
