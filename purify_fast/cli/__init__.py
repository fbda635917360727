"""The command line: ``purify-fast train ... | recipe | evaluate | check | zoo | ...``.

A command imports PyTorch only when it runs, so help and the refusal of wrong options do not wait for the import.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from .._files import folder_lock, usable_device, what_is
from .._memory import ran_out_of_memory
from .._version import __version__
from . import certify, evaluate, show, train  # noqa: F401
from .command import RUN_FILE, Command, DataCommand, cli, flag, parse, run_of, values

__all__ = ["main"]


#: The variables by which a user decides how OpenMP's threads wait.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
#: All commands, which register themselves, by their names: the trainings before the others.
_KINDS = dict(sorted(Command.kinds.items(), key=lambda item: not item[0].startswith("train ")))


def _any_of(kinds: dict[str, type]) -> Any:
    """The union of the classes of several commands, from which tyro makes a parser with these commands."""
    members = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
    return Union[tuple(members)]  # noqa: UP007


def _read(arguments: list[str]) -> Command:
    for length in (1, 2):
        name = " ".join(arguments[:length])
        if name in _KINDS:
            return parse(_KINDS[name], arguments[length:])
        if name in train.ELSEWHERE:
            raise ValueError(f"{name} is no command: {train.ELSEWHERE[name]}")
    if arguments[:1] == ["--version"]:
        print(f"purify-fast {__version__}")
        raise SystemExit
    words = arguments[: 2 if arguments[:1] == ["train"] else 1]
    names = {" ".join(name.split()[: len(words)]) for name in _KINDS}
    if words and not words[-1].startswith("-") and words != ["train"]:
        near = difflib.get_close_matches(" ".join(words), names, 1)
        meant = f"is {near[0]} meant? " if near else ""
        raise ValueError(f"no command {' '.join(words)!r}: {meant}The commands are {', '.join(sorted(names))}")
    # No command is named, as in `purify-fast --help`: the parser lists all commands without their options. Only the
    # completion of a shell is made with all options.
    listed = dict(_KINDS)
    if not "".join(arguments[:1]).startswith("--tyro-"):
        empty = {name: {"__doc__": kind.__doc__} for name, kind in _KINDS.items()}
        listed = {name: make_dataclass("Listed", (), namespace=doc) for name, doc in empty.items()}
    trains = {name.split()[1]: kind for name, kind in listed.items() if name.startswith("train ")}
    text = "Train a classifier, or a defence in front of a classifier. torchrun runs several processes."
    doc = {"__doc__": f"{text} `purify-fast train --resume FOLDER` continues an interrupted training."}
    training = make_dataclass("Train", [("what", _any_of(trains))], namespace=doc)
    top = {name: listed.get(name, training) for name in (called.split()[0] for called in _KINDS)}
    described = "Adversarial purification: train, attack and evaluate defences of image classifiers."
    described += " --version prints the version. `purify-fast COMMAND --help` lists the options of a command."
    example = "evaluate zoo:digits-pgd-at --protocol fast --images 40"
    return cli(_any_of(top), arguments, example, prog="purify-fast", description=described)


def _resumed(arguments: list[str]) -> list[str]:
    """Replace ``train --resume FOLDER`` by the command of the folder's run.yaml. Further options win over the file."""
    if arguments[:2] != ["train", "--resume"]:
        return arguments
    if len(arguments) == 2:
        raise ValueError("--resume needs a folder: purify-fast train --resume FOLDER")
    folder = Path(arguments[2])
    command = str(run_of(folder).get("command"))
    if not command.startswith("train ") or command not in _KINDS:
        raise ValueError(f"--resume needs the folder of a training with its {RUN_FILE}, but {folder} {what_is(folder)}")
    return [*command.split(), "--config", str(folder / RUN_FILE), "--out", str(folder), *arguments[3:]]


def _run(arguments: list[str]) -> int:
    with contextlib.ExitStack() as stack:
        # Loading a user's model adds the folder of its code to `sys.path`. Restore `sys.path` when the command ends.
        stack.callback(sys.path.__setitem__, slice(None), list(sys.path))
        # torchrun sets this variable.
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            from ..training.distributed import torchrun_group

            stack.enter_context(torchrun_group())
        arguments = _resumed(arguments)
        command = _read(arguments)
        from ..speed import retain_freed_memory
        from ..training.distributed import own_device

        # PyTorch is imported now, so that Ctrl-C can no longer interrupt its import.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        retain_freed_memory()
        if isinstance(command, DataCommand):
            command = replace(command, device=own_device(usable_device(command.device)))
        # `typed` is no field, so run.yaml does not contain it. A frozen dataclass refuses a plain assignment.
        object.__setattr__(command, "typed", tuple(arguments))
        # Only the first of several processes writes, so only the first locks the folder.
        stack.enter_context(folder_lock(None if _rank() > 0 else command.writes()))
        return command.run() or 0


class _Unread(io.FileIO):
    """A file that accepts all bytes, also after a program such as `head` has closed the pipe, or on a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _unread(stream: Any) -> Any:
    """Return a stream like stdout or stderr, to which printing never fails: no text decides about the work."""
    if stream not in (sys.__stdout__, sys.__stderr__) or stream is None:
        return stream
    stream.flush()
    file = io.BufferedWriter(_Unread(stream.fileno(), "w", closefd=False))
    settings = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", **settings)


def _with_options(message: str, arguments: list[str]) -> str:
    """Write the names of a command's options in a message as on the command line: kl_delay as --kl-delay."""
    kind = _KINDS.get(" ".join(arguments[:2])) or _KINDS.get("".join(arguments[:1]))
    for name in [] if kind is None else values(kind()):
        # A name that is also an English word is an option at the beginning of the message.
        place = rf"(?<![\w.`'-]){name}\b(?!\()" if "_" in name else rf"^{name}(?= (must|has|is) )"
        message = re.sub(place, flag(name), message)
    return re.sub(r"^image_size\b", "--size", message)


def _rank() -> int:
    """The rank of this process, which torchrun sets; 0 for a single process."""
    return int(os.environ.get("RANK") or 0)


def main(arguments: list[str] | None = None) -> int:
    """Run a command of the program ``purify-fast``.

    Args:
        arguments: the words after the program's name; None takes the words of this process.

    Returns:
        The exit status. 0: success. 1: ``check`` found that a model does not fit a report. 2: the input cannot
        be used, or there is not enough memory; stderr has one line about it. 130: Ctrl-C. Other errors, in this package
        or in the user's code, are raised.
    """
    # A caller's process decides itself about its output and its threads.
    if arguments is None:
        sys.stdout, sys.stderr = _unread(sys.stdout), _unread(sys.stderr)
        # OpenMP reads its settings when PyTorch is loaded.
        if not any(name in os.environ for name in WAITING):
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        # Each of several processes prints its own error, so the message names the process.
        rank = _rank()
        # stderr may be closed, or a file on a full disk.
        with contextlib.suppress(OSError, ValueError):
            said = _with_options(str(error), words)
            print(f"purify-fast{f', process {rank}' if rank else ''}: {said}", file=sys.stderr)
        return 2
    except Exception as error:
        if ran_out_of_memory(error):
            print(f"purify-fast: not enough memory: {error}; give a smaller --batch-size", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("purify-fast: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
