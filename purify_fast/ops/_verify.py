"""Kernels are verified on the machine they run on: compared once with their definition in float64.

The first call that a kernel would serve compares it on a handful of inputs of its own (`_examples`) and keeps the
verdict on disk (`_verdicts`). A kernel that fails does not serve on this machine. ``PURIFY_FAST_VERIFY=off`` lets every
kernel serve unverified.

The error that is allowed is that of the tests: twice the error of the definition in the same dtype, and two units in
the last place of the largest number; none where a kernel must have the definition's bits. Where an example says so,
another error is allowed (`Example.slack`, `Example.jumps`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _races, _verdicts
from ._examples import Example, double, of, tensors, to
from ._op import REGISTRY, Op, Style
from ._verdicts import Verdict

logger = logging.getLogger("purify_fast")

MODES = ("first_use", "off")
#: The threads that verify now. What they call is served by definitions, or by kernels that have been verified already.
_verifying: set[int] = set()
#: This process's verdicts, by file and op; they outlast a folder that cannot be written.
_known: dict[tuple[str, str], Verdict] = {}
#: By type of device, while a run lasts: the kernels that do not serve in it, and whether the others serve unasked.
_agreed: dict[str, tuple[frozenset[str], bool]] = {}
#: When a kernel is tried again that could not be verified for want of memory, by file and op.
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


def compare(op: Op, device: torch.device, examples: list[Example]) -> Deviation:
    """The case of the op's kernel on a device that comes closest to its budget, or exceeds it most."""
    worst: Deviation | None = None
    with torch.no_grad():
        for example in examples:
            for dtype in example.dtypes:
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


def _verify(op: Op, device: torch.device, backend: str) -> tuple[Verdict, bool]:
    """A new verdict, and whether it is one to keep: an error such as a lack of memory may be gone the next time."""
    began, keep = time.perf_counter(), True
    try:
        found = _apart(lambda: compare(op, device, of(op.name)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        lacking = f"{_verdicts.NO_MEMORY}: " if _lacks_memory(error) else ""
        found, keep = Deviation(math.inf, 0.0, f"{lacking}{type(error).__name__}: {first}"), False
    verdict = Verdict(
        backend=backend,
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


def _warn(op: Op, device: torch.device, verdict: Verdict, ran: bool) -> None:
    where, what = _verdicts.machine(device)["device"], "is wrong" if ran else "cannot be run"
    warnings.warn(
        f"purify_fast: the {verdict.backend} kernel of {op.name} {what} on {where}: {verdict.words()}. "
        "It does not serve on this machine, its reference in PyTorch does. Please report it with the output of "
        "`purify-fast info`",
        RuntimeWarning,
        stacklevel=2,
    )


def kept_verdicts(device: torch.device) -> dict[str, Verdict]:
    """The verdicts by op, of this process and on the disk; those on other sources or kernels are left out."""
    path = _verdicts.file_of(device)
    found = _verdicts.read(path, _verdicts.machine(device))
    found |= {name: verdict for (file, name), verdict in _known.items() if file == str(path)}
    return {
        name: verdict for name, verdict in found.items() if name in REGISTRY and _holds(REGISTRY[name], verdict, device)
    }


def _holds(op: Op, verdict: Verdict, device: torch.device) -> bool:
    """Whether a verdict is on the op's kernel as it is now."""
    return verdict.sources == op.sources_digest(device.type) and verdict.backend == op.kernel(device.type)


def kept(op: Op, device: torch.device) -> Verdict | None:
    """The verdict on the op's kernel as it is now, from this process or from the disk; None where there is none."""
    path = _verdicts.file_of(device)
    found = _known.get((str(path), op.name)) or _verdicts.read(path, _verdicts.machine(device)).get(op.name)
    if found is None or not _holds(op, found, device):
        return None
    _known[str(path), op.name] = found
    return found


def verdict_of(op: Op, device: torch.device) -> Verdict:
    """The verdict on the op's kernel, which is verified if there is none; one process at a time."""
    found = kept(op, device)
    if found is not None:
        return found
    path, facts = _verdicts.file_of(device), _verdicts.machine(device)
    with _verdicts.locked(path) as writable:
        found = kept(op, device)  # another process may have verified it meanwhile
        if found is not None:
            return found
        found, keep = _verify(op, device, op.kernel(device.type))
        if found.postponed:
            _postponed[str(path), op.name] = time.monotonic() + PATIENCE
            logger.warning(
                "%s: its kernel is %s; the reference serves, and it is tried again after %d s",
                op.name, found.case, PATIENCE,
            )  # fmt: skip
            return found
        _known[str(path), op.name] = found
        if keep and writable:
            try:
                _verdicts.write(path, facts, {**_verdicts.read(path, facts), op.name: found})
            except OSError as error:
                writable = False
                logger.info("%s cannot be written: %s", path, error)
        if keep and not writable:
            _say_unwritable(str(path))
    logger.info("%s: %s verified in %.2f s, %s", op.name, found.backend, found.seconds, found)
    if not found.passed:
        # a verdict that is not kept is of an error: no Triton, no compiler, no memory
        _warn(op, device, found, ran=keep)
    return found


@functools.cache  # once per process
def _say_unwritable(path: str) -> None:
    logger.warning(
        "%s cannot be written: kernels are verified in every process; PURIFY_FAST_CACHE names a folder", path
    )


def serves(op: Op, device: torch.device) -> bool | None:
    """Whether the op's kernel may serve on a device; None where that cannot be told now, and is asked again."""
    if mode() == "off":
        return True
    if device.type in _agreed:
        wrong, final = _agreed[device.type]
        if final or op.name in wrong:
            return op.name not in wrong
    if threading.get_ident() in _verifying:
        return None
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return None
    if _postponed.get((str(_verdicts.file_of(device)), op.name), 0.0) > time.monotonic():
        return None
    found = verdict_of(op, device)
    return None if found.postponed else found.passed


def _may_serve(op: Op, style: Style, device: torch.device) -> bool:
    """Whether an op's kernel would serve some call, were it right."""
    if op.kernel(device.type) == "reference":
        return False
    calls = [_races.Call(variant) for variant in ("", *op.replaces_many)]
    if device.type != "cuda" or torch.cuda.is_available():
        calls += _races.calls(op.name, op.sources_digest(device.type), style, device)
    return any(op.wanted(style, device, one.variant, one.dtype, one.bits).backend != "reference" for one in calls)


def wrong_kernels(device: torch.device) -> list[str]:
    """The ops whose kernels would serve on a device and are wrong there; what has no verdict is verified now.

    Args:
        device: where the kernels run.
    """
    if mode() == "off":
        return []
    styles: tuple[Style, ...] = ("eager", "graph")
    return [
        name
        for name, op in REGISTRY.items()
        if any(_may_serve(op, style, device) for style in styles) and not verdict_of(op, device).passed
    ]


@contextlib.contextmanager
def agreed(wrong: Iterable[str], kind: str, *, final: bool) -> Iterator[None]:
    """Within the block, these kernels serve in no call, so that all processes of a run compute with the same kernels.

    Args:
        wrong: what `wrong_kernels` gave in the process that decides.
        kind: of the devices that they are about.
        final: whether the others serve without being verified here.
    """
    before = dict(_agreed)
    _agreed[kind] = (frozenset(wrong), final)
    try:
        yield
    finally:
        _agreed.clear()
        _agreed.update(before)


def verify_all(device: torch.device) -> dict[str, Verdict]:
    """The verdicts on every op that has a kernel for a device; those that are missing are made now."""
    return {name: verdict_of(op, device) for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
