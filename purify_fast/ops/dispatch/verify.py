"""Verifies kernels on the machine on which they run: each kernel is compared once with its definition in float64.

The allowed error is twice the error of the definition in the same dtype, plus two units in the last place of the
largest number, or 0 if a kernel must have the same bits (see also `Example.slack` and `Example.jumps`).
"""

from __future__ import annotations

import datetime
import functools
import importlib
import logging
import math
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..._validation import in_one_line
from . import records
from .examples import Example, double, tensors, to
from .op import Definition

logger = logging.getLogger("purify_fast")

#: If a result is not continuous (`Example.jumps`), the root mean square of its error is compared. The allowed error is
#: twice that of the definition in the same dtype, plus this multiple of the result's root mean square.
JUMPS = 0.1
#: The dtypes for the letters of `Example.gpu`.
DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
#: Has the attribute ``active`` in the thread that verifies a kernel: its own calls use references.
_verifying = threading.local()


@dataclass(frozen=True)
class Verdict:
    """The deviation of a kernel from its definition, for the case with the largest error for its budget."""

    error: float
    budget: float
    case: str
    status: Literal["compared", "raised"] = "compared"
    seconds: float = 0.0
    date: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a multiple of the allowed error."""
        return self.error / self.budget if self.budget > 0 else math.inf if self.error > 0 else 0.0

    def words(self) -> str:
        """Return the verdict in words, for `purify-fast info` and for warnings."""
        if self.passed:
            return f"verified {self.date[:10]}, error {self.error:.1g} of {self.budget:.1g} allowed"
        if math.isfinite(self.error):
            return f"an error of {self.error:.2g} where {self.budget:.2g} is allowed ({self.case})"
        return self.case


def cases(op: Definition, device: torch.device) -> list[tuple[Example, torch.dtype]]:
    """Return the examples, each with a dtype, that verify a kernel on a device."""
    # A GPU's kernel is compiled for every dtype and setting, which takes a third of a second each. So the examples and
    # dtypes of `Example.gpu` represent the whole op there.
    if device.type == "cpu":
        return [(example, item) for example in op.examples for item in example.dtypes]
    return [(item, DTYPES[letter]) for item in op.examples for letter in item.gpu if DTYPES[letter] in item.dtypes]


def deviation(actual: Tensor, golden: Tensor, same: Tensor, example: Example, case: str) -> Verdict:
    """Compare a kernel's output on the CPU with the definition's, in float64 (``golden``) and its dtype (``same``)."""
    if actual.shape != same.shape or actual.dtype != same.dtype:
        return Verdict(math.inf, 0.0, f"{case}: {actual.dtype} {list(actual.shape)}")
    ok = same.isfinite() & golden.isfinite()
    if not torch.equal(actual[~ok].nan_to_num(), same[~ok].nan_to_num()) or not actual[ok].isfinite().all():
        return Verdict(math.inf, 0.0, f"{case}: not finite")
    floating, eps = actual.is_floating_point(), torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    actual, same, golden = actual[ok], same[ok], golden[ok]
    if example.jumps and not floating:
        # Integers that jump are words of bits.
        shifts = torch.arange(8 * actual.element_size())
        actual, same, golden = ((words[:, None] >> shifts) & 1 for words in (actual, same, golden))
    actual, same, golden = actual.double(), same.double(), golden.double()
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, case)
    if example.exact or not (floating or example.jumps):
        return Verdict(float((actual - same).abs().max()), 0.0, case)
    if example.jumps:
        error, allowed, size = (float(part.square().mean().sqrt()) for part in (actual - golden, same - golden, golden))
        return Verdict(error, 2 * allowed + JUMPS * size, case)
    size = float(golden.abs().max())
    error, allowed = float((actual - golden).abs().max()), 2 * float((same - golden).abs().max())
    return Verdict(error, 2 * eps * size + (example.slack * 2.0**-23 * size if example.slack else allowed), case)


def compare(op: Definition, device: torch.device, chosen: list[tuple[Example, torch.dtype]]) -> Verdict:
    """Run the op's kernel on a device. Return the case with the largest error relative to its allowed error."""
    deviations = []
    with torch.no_grad():
        if op.kernel(device.type) == "triton":
            # The module imports Triton, so it is imported only if there are Triton kernels. All kernels are compiled
            # in parallel, which takes seconds.
            print(f"purify_fast verifies the kernel of {op.name}, once on this machine", file=sys.stderr)
            ahead = importlib.import_module("purify_fast.kernels._ahead")
            ahead.compile_together(lambda: [op.handle(*to(item.make(dtype, 0), device)) for item, dtype in chosen])
        for example, dtype in chosen:
            arguments = example.make(dtype, 0)
            outputs = tensors(op.handle(*to(arguments, device)))
            same, golden = (tensors(op.reference(*args)) for args in (arguments, double(arguments)))
            for index, (actual, exact, rounded) in enumerate(zip(outputs, golden, same, strict=True)):
                case = f"{example.name}, {str(dtype).removeprefix('torch.')}, output {index}"
                deviations.append(deviation(actual.cpu(), exact, rounded, example, case))
    return max(deviations, key=lambda item: item.share)


def _verify(op: Definition, device: torch.device) -> Verdict:
    began = time.perf_counter()
    try:
        # A new thread has none of the caller's modes: gradients, autocast, fake tensors, vmap.
        with ThreadPoolExecutor(1, initializer=setattr, initargs=(_verifying, "active", True)) as pool:
            worst = pool.submit(compare, op, device, cases(op, device)).result()
    except Exception as error:
        worst = Verdict(math.inf, 0.0, in_one_line(error), status="raised")
    now = datetime.datetime.now().isoformat(timespec="seconds")
    return replace(worst, seconds=round(time.perf_counter() - began, 3), date=now)


def _warn(op: Definition, device: torch.device, verdict: Verdict) -> None:
    """Warn that a kernel is not used."""
    backend, where = op.kernel(device.type), records.machine(device)["device"]
    # If Triton finds no compiler, the text is the same for all kernels, so it is shown once.
    wrong = verdict.status == "compared"
    what = f"the {backend} kernel of {op.name} is wrong" if wrong else f"a {backend} kernel cannot be run"
    hint = "Triton needs a C compiler and Python.h (apt-get install gcc python3-dev). " if backend == "triton" else ""
    text = f"purify_fast: {what} on {where}: {verdict.words()}. On this machine PyTorch computes the op instead. "
    report = "Please report this warning with the output of `purify-fast info`"
    warnings.warn(f"{text}{hint}{report}", RuntimeWarning, stacklevel=2)


# The warning is shown once per process.
@functools.cache
def _warn_unwritable(error: str) -> None:
    logger.warning("%s. Until then, every process verifies kernels", error)


def known_verdict(op: Definition, device: torch.device) -> Verdict | None:
    """Return the verdict on the op's current kernel, or None if there is none. Verify nothing."""
    entry = records.entry_of(op.name, op.code_hash(device.type), device)
    return Verdict(**entry["verdict"]) if "verdict" in entry else None


def verdict_of(op: Definition, device: torch.device) -> Verdict:
    """Return the verification of an op's kernel on a device, made now if missing."""
    verdict = known_verdict(op, device)
    if verdict is None:
        verdict = _verify(op, device)
        logger.info("%s: %s verified in %.2f s, %s", op.name, op.kernel(device.type), verdict.seconds, verdict)
        try:
            # A verdict on a kernel that raised an error is not stored on the disk, because the kernel may work in the
            # next process, for example with a compiler, with more memory or with another driver.
            entry = {"sources": op.code_hash(device.type), "verdict": asdict(verdict)}
            records.update(device, {op.name: entry}, write=verdict.status == "compared")
        except OSError as error:
            _warn_unwritable(str(error))
        if not verdict.passed:
            _warn(op, device, verdict)
    return verdict


def is_correct(op: Definition, device: torch.device) -> bool | None:
    """Return True if the op's kernel may be used on a device, False if it is wrong, None if this is not known now."""
    if getattr(_verifying, "active", False):
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None
    return verdict_of(op, device).passed
