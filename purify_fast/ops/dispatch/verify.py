"""Verifies kernels on the machine on which they run: each kernel is compared once with its definition in float64.

Before its first use, a kernel is compared on the examples of its op, and the verdict is stored on disk (`records`). A
kernel that fails is not used on this machine. ``PURIFY_FAST_VERIFY=off`` allows every kernel without verification. On a
GPU, a call waits only for the kernels of its own variant and dtype (`cases`), which are compiled in parallel.

The allowed error is that of the tests: twice the error of the definition in the same dtype, plus two units in the last
place of the largest number, or 0 if a kernel must have the same bits. An example can define another allowed error
(`Example.slack`, `Example.jumps`).
"""

from __future__ import annotations

import datetime
import functools
import importlib
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..._memory import ran_out_of_memory
from . import records
from .examples import Example, double, tensors, to
from .op import Call, Definition

logger = logging.getLogger("purify_fast")

MODES = ("first_use", "off")
#: The devices whose kernels take seconds to verify, mostly for their compilation: they show progress.
SLOW = {"cuda"}
#: If memory runs out while a kernel is verified, the kernel is verified again after this many seconds.
PATIENCE = 60.0
#: If a result is not continuous (`Example.jumps`), the root mean square of its error is compared. The allowed error is
#: twice that of the definition in the same dtype, plus this multiple of the result's root mean square.
JUMPS = 0.1
#: The dtypes for the letters of `Example.gpu`.
DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
#: The threads that are verifying a kernel: their own calls use references, or verified kernels.
_verifying: set[int] = set()
#: The verdicts of this process, by file and part (`_part_name`), because the folder may not be writable.
_known: dict[tuple[str, str], Verdict] = {}
#: The time from which a kernel is verified again after its verification ran out of memory. The keys are as in `_known`.
_postponed: dict[tuple[str, str], float] = {}


def mode() -> str:
    """Return ``PURIFY_FAST_VERIFY``: ``first_use`` (default) or ``off``. Raise ValueError for another value."""
    value = os.environ.get("PURIFY_FAST_VERIFY") or MODES[0]
    if value not in MODES:
        raise ValueError(f"PURIFY_FAST_VERIFY must be one of {', '.join(MODES)}, got {value!r}")
    return value


@dataclass(frozen=True)
class Deviation:
    """The deviation of a result from the definition.

    Attributes:
        error: the largest absolute error, or the root mean square of the errors if the result is not continuous
            (`Example.jumps`). Infinite if a result is not finite but should be.
        budget: the allowed error.
        case: the example and its dtype, or the error that a kernel raised.
    """

    error: float
    budget: float
    case: str

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a multiple of the allowed error."""
        return self.error / self.budget if self.budget > 0 else math.inf if self.error > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict(Deviation):
    """The result of one verification, for the example and dtype with the largest error relative to the allowed error.

    Attributes:
        backend: the backend whose kernel was verified.
        sources: hash of the kernel's sources.
        status: ``compared``; ``raised`` if the kernel could not be run; or ``no memory``, which means that the kernel
            may be correct or not.
        seconds: duration of the verification.
        date: date of the verification in ISO 8601.
    """

    backend: str
    sources: str
    status: Literal["compared", "raised", "no memory"]
    seconds: float
    date: str

    def words(self) -> str:
        """Return the verdict in words, for `purify-fast info` and for warnings."""
        if self.passed:
            return f"verified {self.date[:10]}, error {self.error:.1g} of {self.budget:.1g} allowed"
        if math.isfinite(self.error):
            return f"an error of {self.error:.2g} where {self.budget:.2g} is allowed ({self.case})"
        return self.case


def _part(call: Call) -> Call:
    """Return the part of the op to which a call belongs: all calls that are verified together with it.

    On a GPU, these are the calls of the same variant and dtype; on a CPU, they are all calls of the op.
    """
    whole = call.device.type == "cpu" or call.dtype is None
    return Call(call.device) if whole else Call(call.device, call.variant, call.dtype)


def _part_name(op: Definition, part: Call) -> str:
    """Return the name of a part in a file of verdicts. It begins with the op's name."""
    return f"{op.name} {part.cell}".strip()


def cases(op: Definition, call: Call) -> list[tuple[Example, torch.dtype]]:
    """Return the examples, each with a dtype, that verify a kernel before it is used for a call.

    A CPU's kernel is verified with all examples. A GPU's kernel is compiled for every dtype and setting, which takes a
    third of a second each. So the examples and dtypes of `Example.gpu` represent the whole op. A call of one variant
    and dtype uses only the examples of this variant, in this dtype.
    """
    dtype = call.dtype
    if call.device.type == "cpu":
        return [(example, one) for example in op.examples for one in example.dtypes]
    standing = [(one, DTYPES[letter]) for one in op.examples for letter in one.gpu if DTYPES[letter] in one.dtypes]
    if dtype is None:
        return standing
    own = [(example, dtype) for example in op.examples if example.gpu and dtype in example.dtypes]
    # Without an example of the call's variant, use all variants; without one of its dtype, those of `Example.gpu`.
    return [case for case in own if case[0].variant == call.variant] or own or standing


def deviation(actual: Tensor, golden: Tensor, same: Tensor, example: Example, case: str) -> Deviation:
    """Compare a kernel's output on the CPU with the definition's: ``golden`` in float64, ``same`` in the output's
    dtype.
    """
    if actual.shape != same.shape or actual.dtype != same.dtype:
        return Deviation(math.inf, 0.0, f"{case}: {actual.dtype} {list(actual.shape)}")
    ok = same.isfinite() & golden.isfinite()
    if not torch.equal(actual[~ok].nan_to_num(), same[~ok].nan_to_num()) or not actual[ok].isfinite().all():
        return Deviation(math.inf, 0.0, f"{case}: not finite")
    floating, eps = actual.is_floating_point(), torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    actual, same, golden = actual[ok].double(), same[ok].double(), golden[ok].double()
    if actual.numel() == 0:
        return Deviation(0.0, 0.0, case)
    if example.exact or not floating:
        return Deviation(float((actual - same).abs().max()), 0.0, case)
    if example.jumps:
        error, allowed, size = (float(one.square().mean().sqrt()) for one in (actual - golden, same - golden, golden))
        return Deviation(error, 2 * allowed + JUMPS * size, case)
    size = float(golden.abs().max())
    error, allowed = float((actual - golden).abs().max()), 2 * float((same - golden).abs().max())
    return Deviation(error, 2 * eps * size + (example.slack * 2.0**-23 * size if example.slack else allowed), case)


def compare(op: Definition, device: torch.device, chosen: list[tuple[Example, torch.dtype]]) -> Deviation:
    """Run the op's kernel on a device. Return the case with the largest error relative to its allowed error."""
    deviations = []
    with torch.no_grad(), _progress(op, device, chosen) as shown:
        if op.kernel(device.type) == "triton":
            _compile(op, device, chosen)
        for example, dtype in shown:
            arguments = example.make(dtype, 0)
            outputs = tensors(op.handle(*to(arguments, device)))
            same, golden = (tensors(op.reference(*given)) for given in (arguments, double(arguments)))
            for index, (actual, exact, rounded) in enumerate(zip(outputs, golden, same, strict=True)):
                case = f"{example.name}, {str(dtype).removeprefix('torch.')}, output {index}"
                deviations.append(deviation(actual.cpu(), exact, rounded, example, case))
    if not deviations:
        raise ValueError(f"the op {op.name} has no examples with which its kernel could be verified")
    return max(deviations, key=lambda one: one.share)


def _progress(op: Definition, device: torch.device, chosen: list) -> tqdm:
    """Iterate over the cases. Show which op is verified, how many cases are done, and the elapsed seconds."""
    layout = "{desc}: {n_fmt} of {total_fmt}, {elapsed_s:.1f} s"
    words = f"purify_fast verifies the kernel of {op.name}, once on this machine"
    return tqdm(chosen, words, file=sys.stderr, bar_format=layout, disable=device.type not in SLOW)


def _compile(op: Definition, device: torch.device, chosen: list[tuple[Example, torch.dtype]]) -> None:
    """Compile the Triton kernels of the cases in parallel."""
    # The module imports Triton, so it is imported only if there are Triton kernels.
    ahead = importlib.import_module("purify_fast.kernels._ahead")

    def launch() -> None:
        for example, dtype in chosen:
            op.handle(*to(example.make(dtype, 0), device))

    ahead.compile_together(launch)


def _in_fresh_thread(function: Callable[[], Deviation]) -> Deviation:
    """Run in a new thread, which has none of the caller's modes: gradients, autocast, fake tensors, vmap."""

    def work() -> Deviation:
        _verifying.add(threading.get_ident())
        try:
            return function()
        finally:
            _verifying.discard(threading.get_ident())

    with ThreadPoolExecutor(1, "purify_fast-verify") as pool:
        return pool.submit(work).result()


def _verify(op: Definition, part: Call) -> Verdict:
    began, device = time.perf_counter(), part.device
    status: Literal["compared", "raised", "no memory"] = "compared"
    try:
        worst = _in_fresh_thread(lambda: compare(op, device, cases(op, part)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        worst = Deviation(math.inf, 0.0, f"{type(error).__name__}: {first}")
        status = "no memory" if ran_out_of_memory(error) else "raised"
    return Verdict(
        **asdict(worst),
        backend=op.kernel(device.type),
        sources=op.code_hash(device.type),
        status=status,
        seconds=round(time.perf_counter() - began, 3),
        date=datetime.datetime.now().isoformat(timespec="seconds"),
    )


def _warn(name: str, device: torch.device, verdict: Verdict) -> None:
    """Warn that a kernel is not used. If a missing compiler is the reason, a single warning covers all kernels."""
    lacking = records.missing_compiler() if verdict.backend == "triton" and verdict.status == "raised" else None
    if lacking is not None:
        _warn_lacking(lacking)
        return
    where, what = records.machine(device)["device"], "is wrong" if verdict.status == "compared" else "cannot be run"
    warnings.warn(
        f"purify_fast: the {verdict.backend} kernel of {name} {what} on {where}: {verdict.words()}. "
        "On this machine PyTorch computes this op instead. Please report this warning with the output of "
        "`purify-fast info`",
        RuntimeWarning,
        stacklevel=2,
    )


# The warning is shown once per process.
@functools.cache
def _warn_lacking(lacking: str) -> None:
    warnings.warn(f"purify_fast: {lacking}", RuntimeWarning, stacklevel=2)


# The warning is shown once per process.
@functools.cache
def _warn_unwritable(path: str) -> None:
    logger.warning(
        "%s cannot be written, so every process verifies kernels: set PURIFY_FAST_CACHE to a writable folder", path
    )


def _holds(op: Definition, verdict: Verdict, device: torch.device) -> bool:
    """Return True if a result of a verification (`Verdict`) is about the current source and backend of the kernel."""
    return verdict.sources == op.code_hash(device.type) and verdict.backend == op.kernel(device.type)


def _read(device: torch.device) -> dict[str, Verdict]:
    """Return the verdicts of this process and those on the disk, by the name of the part (see `_part_name`)."""
    path, verdicts = str(records.file_of("verified", device)), {}
    for name, entry in records.read("verified", device).get("ops", {}).items():
        try:
            verdicts[name] = Verdict(**entry)
        except TypeError:
            logger.info("%s: another version wrote the verdict on %s, which is not used", path, name)
    return verdicts | {name: verdict for (file, name), verdict in _known.items() if file == path}


def known_verdicts(ops: Mapping[str, Definition], device: torch.device) -> dict[str, Verdict]:
    """Return the saved verdicts on the current kernels of these ops, by the name of the part. Verify no kernel."""
    by_part = ((ops.get(name.partition(" ")[0]), name, verdict) for name, verdict in _read(device).items())
    return {name: verdict for op, name, verdict in by_part if op is not None and _holds(op, verdict, device)}


def by_op(verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """Return the worst verdict on the parts of each op: a wrong kernel's, or that of the larger relative error."""
    worst: dict[str, Verdict] = {}
    for name, verdict in sorted(verdicts.items(), key=lambda one: (one[1].passed, -one[1].share)):
        worst.setdefault(name.partition(" ")[0], verdict)
    return worst


def verdict_of(op: Definition, call: Call) -> Verdict:
    """Return the verification of the kernel that a call would use, made now if missing. Other processes wait for it."""
    part, device = _part(call), call.device
    name, path = _part_name(op, part), str(records.file_of("verified", device))

    def known() -> Verdict | None:
        verdict = _known.get((path, name)) or _read(device).get(name)
        if verdict is not None and _holds(op, verdict, device):
            return _known.setdefault((path, name), verdict)
        return None

    verdict = known()
    if verdict is not None:
        return verdict
    with records.locked("verified", device):
        # Another process may have verified the kernel in the meantime.
        verdict = known()
        if verdict is not None:
            return verdict
        verdict = _verify(op, part)
        if verdict.status == "no memory":
            _postponed[path, name] = time.monotonic() + PATIENCE
            logger.warning(
                f"memory ran out while the kernel of {name} was verified ({verdict.case}): PyTorch computes this op "
                f"for now, and the kernel is verified again after {PATIENCE:.0f} s"
            )
            return verdict
        _known[path, name] = verdict
        # A verdict on a kernel that raised an error is not stored on the disk, because the kernel may work in the next
        # process, for example with a compiler or with another driver.
        if verdict.status == "compared":
            try:
                records.update("verified", device, {name: asdict(verdict)}, {})
            except OSError:
                _warn_unwritable(path)
    logger.info("%s: %s verified in %.2f s, %s", name, verdict.backend, verdict.seconds, verdict)
    if not verdict.passed:
        _warn(name, device, verdict)
    return verdict


def serves(op: Definition, call: Call) -> bool | None:
    """Return True if the op's kernel may be used for a call, and False if it is wrong or cannot be run.

    Return None if this is not known now. The caller then uses the reference, and asks again at the next call.
    """
    if mode() == "off":
        return True
    device, name = call.device, _part_name(op, _part(call))
    if threading.get_ident() in _verifying:
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None
    if _postponed.get((str(records.file_of("verified", device)), name), 0.0) > time.monotonic():
        return None
    verdict = verdict_of(op, call)
    return None if verdict.status == "no memory" else verdict.passed
