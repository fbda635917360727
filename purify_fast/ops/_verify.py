"""Kernels are verified on the machine they run on: compared once with their definition in float64.

The first call that a kernel would serve compares it on a handful of inputs of its own (`_examples`) and keeps the
verdict on disk (`_verdicts`). A kernel that fails does not serve on this machine. ``PURIFY_FAST_VERIFY=off`` lets every
kernel serve unverified.

On a GPU a call waits for the kernels of its own variant and dtype alone (`_cases`), which are compiled side by side; so
an evaluation verifies what its model and its attacks reach, and nothing else. A line on stderr says what it waits for.

The error that is allowed is that of the tests: twice the error of the definition in the same dtype, and two units in
the last place of the largest number; none where a kernel must have the definition's bits. Where an example says so,
another error is allowed (`Example.slack`, `Example.jumps`).
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from . import _compiler, _verdicts
from ._cases import cases
from ._examples import Example, double, tensors, to
from ._op import REGISTRY, Op
from ._races import cell
from ._verdicts import Verdict

logger = logging.getLogger("purify_fast")

MODES = ("first_use", "off")
#: The threads that verify now. What they call is served by definitions, or by kernels that have been verified already.
_verifying: set[int] = set()
#: This process's verdicts, by file and part; they outlast a folder that cannot be written.
_known: dict[tuple[str, str], Verdict] = {}
#: By type of device, while a run lasts: the parts whose kernels do not serve in it.
_agreed: dict[str, frozenset[str]] = {}
#: The types of devices whose kernels take seconds to verify, mostly to compile, so that progress is shown.
SLOW = {"cuda"}
#: When a kernel is tried again that could not be verified for want of memory, by file and part.
_postponed: dict[tuple[str, str], float] = {}
#: Seconds until then.
PATIENCE = 60.0
#: The error that is allowed of a result that jumps, relative to the result, both as root mean squares.
JUMPS = 0.1


def mode() -> str:
    """``PURIFY_FAST_VERIFY``: ``first_use``, which is the default, or ``off``; ValueError for another value."""
    value = os.environ.get("PURIFY_FAST_VERIFY") or MODES[0]
    if value not in MODES:
        raise ValueError(f"PURIFY_FAST_VERIFY={value!r} is unknown; allowed: {', '.join(MODES)}")
    return value


@dataclass(frozen=True)
class Part:
    """What is verified at once: a whole op, or on a GPU its calls of one variant and dtype.

    Attributes:
        op: the op.
        variant: of the calls, as the op's module names it.
        dtype: of the calls; None for the whole op.
    """

    op: Op
    variant: str = ""
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """Its name in a file of verdicts, which begins with that of the op."""
        return f"{self.op.name} {cell(self.variant, self.dtype, '')}".strip()


def part_of(op: Op, device: torch.device, variant: str = "", dtype: torch.dtype | None = None) -> Part:
    """What has to be right before an op's kernel serves calls of a variant and dtype on a device."""
    return Part(op) if device.type == "cpu" or dtype is None else Part(op, variant, dtype)


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the definition.

    Attributes:
        error: the largest absolute error, or the root mean square of a result that jumps; infinite where a result is
            not finite and should be.
        budget: the error that is allowed.
        case: the example and its dtype.
    """

    error: float
    budget: float
    case: str

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a multiple of its budget."""
        return self.error / self.budget if self.budget > 0 else math.inf if self.error > 0 else 0.0


def deviation(actual: Tensor, golden: Tensor, same: Tensor, example: Example, case: str) -> Deviation:
    """How far one output is from its definition.

    Args:
        actual: the kernel's output, on the CPU.
        golden: the definition's in float64.
        same: the definition's in the kernel's dtype.
        example: what it is an output of: whether bits must agree, and what else is allowed.
        case: its name in the report.
    """
    if actual.shape != same.shape or actual.dtype != same.dtype:
        return Deviation(math.inf, 0.0, f"{case}: {actual.dtype} {list(actual.shape)}")
    if actual.numel() == 0:
        return Deviation(0.0, 0.0, case)
    exact = example.exact or not actual.is_floating_point()
    ok = same.isfinite() & golden.isfinite()
    if not torch.equal(actual[~ok].nan_to_num(), same[~ok].nan_to_num()) or not actual[ok].isfinite().all():
        return Deviation(math.inf, 0.0, f"{case}: not finite")
    eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    actual, same, golden = actual[ok].double(), same[ok].double(), golden[ok].double()
    if actual.numel() == 0:
        return Deviation(0.0, 0.0, case)
    if exact:
        return Deviation(float((actual - same).abs().max()), 0.0, case)
    if example.jumps:
        error, allowed, size = (float(one.square().mean().sqrt()) for one in (actual - golden, same - golden, golden))
        return Deviation(error, 2 * allowed + JUMPS * size, case)
    size = float(golden.abs().max())
    rounding = 2 * eps * size
    error, allowed = float((actual - golden).abs().max()), 2 * float((same - golden).abs().max())
    return Deviation(error, rounding + (example.slack * 2.0**-23 * size if example.slack else allowed), case)


def compare(op: Op, device: torch.device, chosen: list[tuple[Example, torch.dtype]]) -> Deviation:
    """The case of the op's kernel on a device that comes closest to its budget, or exceeds it most."""
    worst: Deviation | None = None
    with torch.no_grad(), _progress(op, device, chosen) as shown:
        if op.kernel(device.type) == "triton":
            _compile(op, device, chosen)
        for example, dtype in shown:
            arguments = example.make(dtype, 0)
            outputs = tensors(op.handle(*to(arguments, device)))
            same, golden = (tensors(op.reference(*given)) for given in (arguments, double(arguments)))
            for index, (actual, exact, rounded) in enumerate(zip(outputs, golden, same, strict=True)):
                case = f"{example.name}, {str(dtype).removeprefix('torch.')}, output {index}"
                found = deviation(actual.cpu(), exact, rounded, example, case)
                worst = found if worst is None or found.share > worst.share else worst
    if worst is None:
        raise ValueError(f"{op.name} has no examples to verify it with")
    return worst


def _progress(op: Op, device: torch.device, chosen: list) -> tqdm:
    """Goes through the cases, and shows which op is verified, how many of them are done, and for how many seconds."""
    layout = "{desc}: {n_fmt} of {total_fmt}, {elapsed_s:.1f} s"
    words = f"purify_fast verifies the kernel of {op.name}, once on this machine"
    return tqdm(chosen, words, file=sys.stderr, bar_format=layout, disable=device.type not in SLOW)


def _compile(op: Op, device: torch.device, chosen: list[tuple[Example, torch.dtype]]) -> None:
    """Compile, side by side, the Triton kernels that the cases launch."""
    # imports Triton, which is there only where its kernels are
    ahead = importlib.import_module("purify_fast.kernels._ahead")

    def launch() -> None:
        for example, dtype in chosen:
            op.handle(*to(example.make(dtype, 0), device))

    ahead.compile_together(launch)


def _apart(function: Callable[[], Deviation]) -> Deviation:
    """Run in a thread of its own, which has none of the caller's modes: gradients, autocast, fake tensors, vmap."""
    results: list[Deviation] = []
    errors: list[BaseException] = []

    def work() -> None:
        _verifying.add(threading.get_ident())
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            _verifying.discard(threading.get_ident())

    thread = threading.Thread(target=work, name="purify_fast-verify")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _verify(part: Part, device: torch.device) -> tuple[Verdict, bool]:
    """A new verdict, and whether it is one to keep: an error such as a lack of memory may be gone the next time."""
    began, keep, op = time.perf_counter(), True, part.op
    try:
        found = _apart(lambda: compare(op, device, cases(op.name, device.type, part.variant, part.dtype)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        lacking = f"{_verdicts.NO_MEMORY}: " if _lacks_memory(error) else ""
        found, keep = Deviation(math.inf, 0.0, f"{lacking}{type(error).__name__}: {first}"), False
    verdict = Verdict(
        backend=op.kernel(device.type),
        sources=op.sources_digest(device.type),
        passed=found.passed,
        error=min(found.error, _verdicts.LARGEST),
        budget=found.budget,
        case=found.case,
        seconds=round(time.perf_counter() - began, 3),
        date=datetime.datetime.now().isoformat(timespec="seconds"),
    )
    return verdict, keep


def _lacks_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory, which says nothing about a kernel."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)


def _warn(part: Part, device: torch.device, verdict: Verdict, ran: bool) -> None:
    """Say that a kernel does not serve. Without a compiler none does, which one warning tells."""
    lacking = _compiler.missing() if verdict.backend == "triton" and not ran else None
    if lacking is not None:
        _say_lacking(lacking)
        return
    where, what = _verdicts.machine(device)["device"], "is wrong" if ran else "cannot be run"
    warnings.warn(
        f"purify_fast: the {verdict.backend} kernel of {part.name} {what} on {where}: {verdict.words()}. "
        "It does not serve on this machine, its reference in PyTorch does. Please report it with the output of "
        "`purify-fast info`",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache  # once per process
def _say_lacking(lacking: str) -> None:
    warnings.warn(f"purify_fast: {lacking}", RuntimeWarning, stacklevel=2)


def kept_verdicts(device: torch.device) -> dict[str, Verdict]:
    """The verdicts by part, of this process and on the disk; those on other sources or kernels are left out."""
    path = _verdicts.file_of(device)
    found = _verdicts.read(path, _verdicts.machine(device))
    found |= {name: verdict for (file, name), verdict in _known.items() if file == str(path)}
    ops = {name: REGISTRY.get(name.partition(" ")[0]) for name in found}
    return {
        name: verdict
        for name, verdict in found.items()
        if (op := ops[name]) is not None and _holds(op, verdict, device)
    }


def by_op(verdicts: dict[str, Verdict]) -> dict[str, Verdict]:
    """Of the verdicts on an op's parts the worst: one on a kernel that is wrong, else that closest to its budget."""
    worst: dict[str, Verdict] = {}
    for name, verdict in verdicts.items():
        op = name.partition(" ")[0]
        if op not in worst or (not verdict.passed, verdict.share) > (not worst[op].passed, worst[op].share):
            worst[op] = verdict
    return worst


def _holds(op: Op, verdict: Verdict, device: torch.device) -> bool:
    """Whether a verdict is on the op's kernel as it is now."""
    return verdict.sources == op.sources_digest(device.type) and verdict.backend == op.kernel(device.type)


def kept(part: Part, device: torch.device) -> Verdict | None:
    """The verdict on a part's kernel as it is now, from this process or from the disk; None where there is none."""
    path = _verdicts.file_of(device)
    found = _known.get((str(path), part.name)) or _verdicts.read(path, _verdicts.machine(device)).get(part.name)
    if found is None or not _holds(part.op, found, device):
        return None
    _known[str(path), part.name] = found
    return found


def verdict_of(op: Op, device: torch.device, variant: str = "", dtype: torch.dtype | None = None) -> Verdict:
    """The verdict on an op's kernel, which is verified if there is none; one process at a time.

    Args:
        op: the op.
        device: where the kernel runs.
        variant: of the calls that are asked about.
        dtype: of those calls; None: of the op as a whole.
    """
    part = part_of(op, device, variant, dtype)
    found = kept(part, device)
    if found is not None:
        return found
    path, facts = _verdicts.file_of(device), _verdicts.machine(device)
    with _verdicts.locked(path) as writable:
        found = kept(part, device)  # another process may have verified it meanwhile
        if found is not None:
            return found
        found, keep = _verify(part, device)
        if found.postponed:
            _postponed[str(path), part.name] = time.monotonic() + PATIENCE
            logger.warning(
                "%s: its kernel is %s; the reference serves, and it is tried again after %d s",
                part.name, found.case, PATIENCE,
            )  # fmt: skip
            return found
        _known[str(path), part.name] = found
        if keep and writable:
            try:
                _verdicts.write(path, facts, {**_verdicts.read(path, facts), part.name: found})
            except OSError as error:
                writable = False
                logger.info("%s cannot be written: %s", path, error)
        if keep and not writable:
            _say_unwritable(str(path))
    logger.info("%s: %s verified in %.2f s, %s", part.name, found.backend, found.seconds, found)
    if not found.passed:
        # a verdict that is not kept is of an error: no Triton, no compiler, no memory
        _warn(part, device, found, ran=keep)
    return found


@functools.cache  # once per process
def _say_unwritable(path: str) -> None:
    logger.warning(
        "%s cannot be written: kernels are verified in every process; PURIFY_FAST_CACHE names a folder", path
    )


def serves(op: Op, device: torch.device, variant: str = "", dtype: torch.dtype | None = None) -> bool | None:
    """Whether the op's kernel may serve calls on a device; None where that cannot be told now, and is asked again.

    Args:
        op: the op.
        device: of the calls.
        variant: of the calls.
        dtype: of the calls, or None for all.
    """
    if mode() == "off":
        return True
    name = part_of(op, device, variant, dtype).name
    if name in _agreed.get(device.type, ()):
        return False
    if threading.get_ident() in _verifying:
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None
    if _postponed.get((str(_verdicts.file_of(device)), name), 0.0) > time.monotonic():
        return None
    found = verdict_of(op, device, variant, dtype)
    return None if found.postponed else found.passed


@contextlib.contextmanager
def agreed(wrong: Iterable[str], kind: str) -> Iterator[None]:
    """Within the block, these kernels serve in no call, so that all processes of a run compute with the same kernels.

    Args:
        wrong: names of parts that `kept_verdicts` of the process that decides calls wrong.
        kind: of the devices that they are about.
    """
    before = dict(_agreed)
    _agreed[kind] = frozenset(wrong)
    try:
        yield
    finally:
        _agreed.clear()
        _agreed.update(before)


def verify_all(device: torch.device) -> dict[str, Verdict]:
    """The verdicts on every op that has a kernel for a device; those that are missing are made now."""
    return {name: verdict_of(op, device) for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
