"""Makes the text of ``purify-fast info``: versions, the build of the extension, and the backend of each op."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from pathlib import Path

import torch

from .. import _library
from .._templates import render
from .._version import __version__
from ..evaluation.show.tables import terminal_table
from ..ops import REGISTRY
from ..ops.dispatch import races, records
from ..ops.dispatch.op import Call, Style
from ..ops.dispatch.registry import Op, forced_backends
from ..ops.dispatch.verify import Verdict, known_verdict, mode


def facts(extension: str | Path | None) -> dict[str, str | None]:
    """Read the record that setup.py wrote beside an extension. Without a record, return an empty dictionary."""
    # Without an extension the path is None. `with_name` then raises an error, which is ignored.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return json.loads(Path(extension or "").with_name("_build.json").read_text())
    return {}


def _triton() -> str:
    """Triton's version, and a warning if it has no compiler to build kernels."""
    try:
        version, lacking = importlib.metadata.version("triton"), records.missing_compiler()
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return version if lacking is None else f"{version}; WARNING: {lacking}"


def _devices() -> dict[str, torch.device]:
    """The devices that a process on this machine would use, by their types."""
    devices = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["cuda"] = torch.device("cuda", torch.cuda.current_device())
    return devices


def _who(op: Op, style: Style, device: torch.device) -> tuple[str, str]:
    """The names of the backends that compute an op on a device in a style of calls, and the reasons."""
    calls = [] if device.index is None and device.type == "cuda" else races.calls(op, device, style)
    calls = calls or [
        Call(device, variant, style=style) for variant in dict.fromkeys((*op.serves_unraced("eager"), ""))
    ]
    winners = [(call.cell or "others", op.wanted(call)) for call in calls]
    counts = Counter(one.backend for _, one in winners)
    rare = [f"{one.backend} for {cell}" for cell, one in winners if one.backend != max(counts, key=counts.__getitem__)]
    reasons = dict.fromkeys(f"{one.why}, kernel {one.gain}" if one.gain else one.why for _, one in winners)
    return " or ".join(counts), "; ".join([*reasons, *rare])


def _state(op: Op, kind: str, verdict: Verdict | None) -> tuple[str, str, str]:
    """Three texts: the backends of an op in eager calls, those in compiled graphs, and why. No kernel is verified."""
    try:
        forced = op.forced(kind)
    except RuntimeError as error:
        return "nothing", "nothing", str(error)
    if forced is not None:
        return forced, forced, "forced"
    if op.kernel(kind) == "reference":
        missing = "there is no kernel" if _library.loaded() else "the extension is not loaded"
        return "reference", "reference", missing
    if verdict is not None and not verdict.passed:
        why = f"the {op.kernel(kind)} kernel is WRONG here: {verdict.words()}; please report it"
        return "reference", "reference", why
    device = _devices().get(kind, torch.device(kind))
    (eager, why), (graph, inside) = _who(op, "eager", device), _who(op, "graph", device)
    words = [f"eager calls: {why}", f"graphs: {inside}", verdict.words() if verdict else "verified at first use"]
    return eager, graph, "; ".join(words)


def _verdicts(kind: str) -> dict[str, Verdict]:
    """For each op, by its name, the stored result of the verification of its kernel on this machine's CPU or GPU."""
    device = _devices().get(kind)
    known = {} if device is None else {name: known_verdict(op, device) for name, op in REGISTRY.items()}
    return {name: verdict for name, verdict in known.items() if verdict is not None}


def _served(kind: str) -> str:
    """A sentence that counts the ops that kernels compute in eager calls, and names the kernels that are wrong."""
    verdicts = _verdicts(kind)
    eager = [_state(op, kind, verdicts.get(name))[0] for name, op in REGISTRY.items()]
    served = sum(backends not in ("reference", "nothing") for backends in eager)
    forced = f"; {','.join(forced_backends())} is forced" if forced_backends() else ""
    wrong = ", ".join(name for name, verdict in verdicts.items() if not verdict.passed)
    told = f"; WRONG here, and therefore not used: {wrong}; please report it" if wrong else ""
    return f"on {kind}, kernels compute {served} of {len(eager)} ops, and plain PyTorch the others{forced}{told}"


def _raced(kind: str) -> str:
    """A sentence about the saved timings of kernels on this machine's CPU or GPU."""
    device = _devices().get(kind)
    if device is None:
        return "this machine has no GPU; on a GPU, kernels are verified at their first use"
    own, near = records.read(device), races.nearest(records.machine(device))
    if timed := sum("cells" in entry for entry in own["ops"].values()):
        return f"{timed} ops were timed here on {own['date']}, {records.file_of(device)}"
    where = f", but on {near['machine']['device']} on {near['date']}" if near else " or on a similar card"
    return f"no kernel was timed on this machine{where}: run `purify-fast tune`"


def info(everything: bool) -> str:
    """The text of the command ``info``: versions, devices, how many ops kernels compute, and wrong kernels."""
    verdicts = {kind: _verdicts(kind) for kind in ("cpu", "cuda")}
    body = [
        (name if kind == "cpu" else "", kind, ", ".join(exists), *_state(op, kind, verdicts[kind].get(name)))
        for name, op in REGISTRY.items()
        for kind, exists in op.available.items()
    ]
    return render(
        __package__,
        "info.txt.jinja",
        all=everything,
        version=__version__,
        folder=Path(__file__).parents[1],
        python=platform.python_version(),
        torch=torch,
        triton=_triton(),
        processor=records.processor(),
        gpus=[torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())],
        library=_library,
        build=facts(_library.path),
        served=map(_served, _devices()),
        verdicts=records.folder(),
        mode=mode(),
        raced=_raced,
        environment=[f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("PURIFY_FAST_")],
        table=terminal_table(["op", "device", "available", "eager", "in graphs", "why"], body, color=False),
    )
