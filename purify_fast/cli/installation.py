"""Makes the text of ``purify-fast info``: versions, the build of the extension, and the backend of each op."""

from __future__ import annotations

import os
import platform
import textwrap
from pathlib import Path

import torch

from .. import _library
from .._files import render
from .._version import __version__
from ..judge.show.text import TERMINAL
from ..ops import REGISTRY
from ..ops.dispatch import records
from ..ops.dispatch.choices import in_words
from ..ops.dispatch.registry import Op, forced_backends, sizes_here
from ..ops.dispatch.verify import known_verdict

#: The words for a kernel that failed its verification.
WRONG = "WRONG here"


def _state(op: Op, kind: str) -> tuple[str, str, str]:
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
    gpu = kind == "cuda" and torch.cuda.is_available()
    device = torch.device(kind, torch.cuda.current_device()) if gpu else torch.device(kind)
    verdict = known_verdict(op, device) if gpu or kind == "cpu" else None
    if verdict is not None and not verdict.passed:
        return "reference", "reference", f"the {op.kernel(kind)} kernel is {WRONG}: {verdict.words()}; please report it"
    sizes, why = sizes_here(op.name, device)
    eager = in_words(op, op.kernel(kind), sizes)
    graph = in_words(op, op.kernel(kind), dict.fromkeys(op.in_graphs.get(kind, ()), 0))
    return eager, graph, f"{why}; {verdict.words() if verdict else 'verified at first use'}"


def info(everything: bool) -> str:
    """The text of the command ``info``: versions, devices, how many ops kernels compute, and wrong kernels."""
    states = {kind: {name: _state(op, kind) for name, op in REGISTRY.items()} for kind in ("cpu", "cuda")}
    lines = []
    for name, op in REGISTRY.items():
        for kind, exists in op.available.items():
            eager, graph, why = states[kind][name]
            start = f"{name} on {kind}" if kind == "cpu" else f"  on {kind}"
            lines.append(f"{start}: {eager}; in graphs: {graph}; available: {', '.join(exists)}; {why}")
    facts = {"version": __version__, "folder": Path(__file__).parents[1], "python": platform.python_version()}
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    own = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("PURIFY_FAST_")]
    facts |= {"gpus": cards, "environment": own, "wrong": WRONG, "forced": forced_backends()}
    facts["states"] = states if torch.cuda.is_available() else {"cpu": states["cpu"]}
    facts["ops"] = [textwrap.fill(line, TERMINAL, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    modules = {"torch": torch, "records": records, "library": _library}
    return render(__package__, "info.txt.jinja", all=everything, **facts, **modules)
