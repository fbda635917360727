"""``purify-fast tune``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .._files import FolderInUse, folder_lock
from .._validation import Positive
from .command import Command, usable_device

if TYPE_CHECKING:
    from ..ops.dispatch.racing import Tuned


@dataclass(frozen=True)
class Tune(Command):
    """Race the kernels on this machine's device against PyTorch, in under five minutes; the faster ones serve after it.

    Every kernel is verified first. The times are kept for this device and these versions, in the folder that `info`
    names. Run it on a machine that does nothing else.

    Args:
        device: The device whose kernels are raced: cpu, or cuda; auto takes a GPU if there is one.
        full: Race them inside graphs of torch.compile too, which takes minutes more to compile; see --minutes.
        ops: The ops to race, by the names that `info` lists; default: all that have a kernel there.
        again: Race again also what is known of this device and of these versions, which is skipped by default.
        minutes: After so long no race begins, and those left out are named; default: 4.5, and 30 with --full.
    """

    called: ClassVar[str] = "tune"

    device: str = "auto"
    full: bool = False
    ops: tuple[str, ...] = ()
    again: bool = False
    minutes: Positive | None = None

    def run(self) -> None:
        import torch
        from tqdm import tqdm

        from ..ops.dispatch.racing import tune
        from ..ops.dispatch.records import file_of
        from ..ops.dispatch.registry import forced_backends
        from ..speed.graphs.cuda_capture import CudaCapture

        device = torch.device(usable_device(self.device))
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu or cuda: there are kernels for no other, got {self.device!r}")
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        minutes = self.minutes if self.minutes is not None else 30.0 if self.full else 4.5
        with contextlib.ExitStack() as stack:
            try:
                # another process that races this device's kernels would slow both
                stack.enter_context(folder_lock(file_of("raced", device).with_suffix("")))
            except FolderInUse:
                raise
            except (OSError, ValueError):
                # a folder that cannot be written is refused by the race, which says how to name another
                pass
            bar = stack.enter_context(tqdm(total=100, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}"))

            def tell(share: float, what: str) -> None:
                bar.n = round(100 * share)
                bar.set_description(what[:60], refresh=True)

            capture = CudaCapture() if device.type == "cuda" else None
            tuned = tune(
                device, seconds=60 * minutes, full=self.full, ops=self.ops, again=self.again, capture=capture, tell=tell
            )
            tell(1.0, "raced")
        print(text(tuned))
        if forced_backends():
            print(
                f"PURIFY_FAST_BACKEND forces {', '.join(forced_backends())}: what was measured here serves without it."
            )


def text(tuned: Tuned) -> str:
    """The text that the command prints about the races that were run."""
    from .._templates import render
    from ..evaluation.show.tables import terminal_table

    groups: dict[tuple[str, str, str, str], list[tuple[str, float]]] = {}
    for change in tuned.changes:
        where = "eager calls" if change.call.style == "eager" else "graphs"
        calls = groups.setdefault((change.op, where, change.before, change.after), [])
        calls.append((change.call.cell, change.gain))
    body = []
    for group, calls in groups.items():
        least, most = (f"{limit(gain for _, gain in calls):.2g}" for limit in (min, max))
        speed = f"{least} to {most} times" if len(calls) > 1 else f"{least} times"
        body.append([*group, speed, ", ".join(cell for cell, _ in calls)])
    head = ["op", "in", "served before", "serves now", "kernel's speed", "calls"]
    return render(__package__, "tune.txt.jinja", tuned=tuned, table=terminal_table(head, body, color=False))
