"""The command line: ``purify-fast demo | train ... | recipe | ablate | evaluate | check | plan | report | zoo | ...``.

PyTorch takes 1.8 seconds to import. The options are read without it, so that help and refusals come at once: each
command imports PyTorch when it runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import make_dataclass, replace
from typing import Annotated, Any, Union

import tyro

from .._files import folder_lock
from .._memory import ran_out_of_memory
from .._version import __version__
from .check import Check
from .command import Command, usable_device
from .evaluate import Evaluate
from .parsing import Refused, cli, early_options, parse
from .plan import Plan, read_plan
from .show import Demo, Info, ShowRecipe, ShowReport, Zoo
from .train_classifier import Ablate, TrainArrest, TrainClassifier
from .train_diffusion import TrainDiffusion
from .train_purifier import TrainAtop, TrainCarso, TrainGenerator
from .training import Training
from .tune import Tune

__all__ = ["main"]


_TRAININGS = (TrainClassifier, TrainCarso, TrainGenerator, TrainAtop, TrainArrest, TrainDiffusion)
_ALL = (Demo, *_TRAININGS, ShowRecipe, Ablate, Evaluate, Check, Plan, ShowReport, Zoo, Tune, Info)
_KINDS: dict[str, type[Command]] = {kind.called: kind for kind in _ALL}


def _any_of(kinds: dict[str, type]) -> Any:
    """The type of a command line that begins with one of these names."""
    members = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
    return Union[tuple(members)]  # noqa: UP007  # made of a list


def _read(arguments: list[str]) -> Command:
    """The command that the words describe."""
    if arguments[:1] == [Plan.called]:
        return read_plan(arguments[1:], _read)
    for length in (1, 2):
        name = " ".join(arguments[:length])
        if name in _KINDS:
            return parse(_KINDS[name], arguments[length:])
    # --version prints and exits
    early_options().parse_known_args(arguments)
    # no command, or no command of this name: the parser of all commands lists them, without their options
    listed = {name: make_dataclass("Listed", (), namespace={"__doc__": kind.__doc__}) for name, kind in _KINDS.items()}
    trains = {name.split()[1]: kind for name, kind in listed.items() if name.startswith("train ")}
    doc = {"__doc__": "Train a classifier, or a defence on one; by torchrun on several GPUs or processors."}
    train = make_dataclass("Train", [("what", _any_of(trains))], namespace=doc)
    top = {name: listed.get(name, train) for name in (called.split()[0] for called in _KINDS)}
    described = "Adversarial purification: train, attack and judge defences of image classifiers."
    return cli(_any_of(top), arguments, prog="purify-fast", description=described)


def _run(arguments: list[str]) -> int:
    # torchrun sets the variable
    several = int(os.environ.get("WORLD_SIZE") or 1)
    with contextlib.ExitStack() as stack:
        # a model of the user's own adds its folder to the path for as long as the command runs
        stack.callback(sys.path.__setitem__, slice(None), list(sys.path))
        if several > 1:
            from ..training.distributed import torchrun_group

            stack.enter_context(torchrun_group())
        command = _read(arguments)
        if several > 1 and not isinstance(command, (Training, Evaluate)):
            raise ValueError(
                f"only train and evaluate can run in several processes, got {several}: run this command in one process"
            )
        from ..speed import retain_freed_memory
        from ..training.distributed import own_device

        retain_freed_memory()
        if isinstance(command, (Training, Evaluate)):
            command = replace(command, device=own_device(usable_device(command.device)))
        # an attribute and no option, so that no file of options has it
        object.__setattr__(command, "typed", tuple(arguments))
        # the first of several processes writes
        stack.enter_context(folder_lock(None if _rank() > 0 else command.writes()))
        return command.run() or 0


def _rank() -> int:
    """The number of this process among several, which torchrun sets."""
    return int(os.environ.get("RANK") or 0)


def _bug() -> int:
    """Print the traceback of an error that nobody foresaw, and how to report it; the exit status."""
    traceback.print_exc()
    print(
        f"purify-fast: this is an error in purify_fast {__version__}, unless the lines above end in code of your own. "
        "Please report it with the lines above, the command line and what `purify-fast info --all` prints.",
        file=sys.stderr,
    )
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point.

    Args:
        arguments: the words behind the program's name; None takes the process's own.

    Returns:
        The exit status: 0; 1 of ``check``, where an image does not fall again; 2, with one line on stderr, for input
        that cannot be used; 130 after Ctrl-C; 1, with a traceback, for an error of this package or of the code of a
        model of the user's own.
    """
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        # Whoever read the output has closed it, such as `head`: there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Refused, ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        # Ranks above 0 reach this only with an error of their own, so the message names the rank.
        rank = _rank()
        # stderr may be a file on a full disk, or closed
        with contextlib.suppress(OSError, ValueError):
            print(f"purify-fast{f', process {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not ran_out_of_memory(error):
            return _bug()
        where = str(error).splitlines()[0] if str(error) else "of this machine"
        advice = "give a smaller --batch-size; `evaluate` also takes --batch-size auto"
        print(f"purify-fast: not enough memory: {where}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("purify-fast: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
