"""The command ``purify-fast tune``, which times kernels against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .._validation import Positive, usable_device
from .command import Command

if TYPE_CHECKING:
    from ..ops.dispatch.racing import Tuned


@dataclass(frozen=True)
class Tune(Command):
    """Time the kernels on this machine against PyTorch, in under five minutes. Later runs use the faster of the two.

    Every kernel is verified first. The times are saved for this device and these versions, in the folder that `info`
    names. Run this command on a machine that does nothing else.

    Args:
        device: Device whose kernels are timed: cpu or cuda. auto: a GPU if there is any.
        ops: Names of the ops to time, as `info` lists them. Default: all ops that have a kernel for this device.
        minutes: Time limit in minutes. No timing begins later, and the missing timings are listed.
    """

    called: ClassVar[str] = "tune"

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ops: tuple[str, ...] = ()
    minutes: Positive = 4.5

    def run(self) -> None:
        import torch

        from ..ops.dispatch.racing import tune
        from ..speed.graphs.cuda_capture import CudaCapture

        device = torch.device(usable_device(self.device))
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        capture = CudaCapture() if device.type == "cuda" else None
        print(text(tune(device, seconds=60 * self.minutes, ops=self.ops, capture=capture)))


def text(tuned: Tuned) -> str:
    """The text that the command ``tune`` prints at its end."""
    from .._templates import render
    from ..evaluation.show.tables import terminal_table

    head = ["op", "calls", "used before", "used now", "kernel's speed"]
    body = [[one.op, one.call.cell, one.before, one.after, f"{one.gain:.2g} times"] for one in tuned.changes]
    return render(__package__, "tune.txt.jinja", tuned=tuned, table=terminal_table(head, body, color=False))
