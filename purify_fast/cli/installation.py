"""What is installed, what was built, and which backend serves each op: ``purify-fast info``."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import os
import platform
import sys
import textwrap
from pathlib import Path

import torch

from .. import _library
from .._version import __version__
from ..evaluation.show.tables import terminal_table
from ..ops import REGISTRY
from ..ops.dispatch import cache, races
from ..ops.dispatch.op import Call, Style
from ..ops.dispatch.registry import Op
from ..ops.dispatch.verify import Verdict, by_op, known_verdicts, mode

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in values.get("flags", "").split() if flag in _CPU_FLAGS]
    name, threads = values.get("model name", platform.processor() or platform.machine()), torch.get_num_threads()
    return f"{name}, {', '.join(flags) or '-'}; {threads} thread{'s' if threads != 1 else ''}"


def _gpu() -> str:
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]
    return "; ".join(told) or "none"


def _triton() -> str:
    """Its version, and what it lacks to build kernels."""
    try:
        version, lacking = importlib.metadata.version("triton"), cache.missing_compiler()
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return version if lacking is None else f"{version}; WARNING: {lacking}"


def facts(extension: str | Path | None) -> dict[str, str | None]:
    """What setup.py recorded beside an extension; empty if there is no record."""
    if extension is None:
        return {}
    try:
        return json.loads(Path(extension).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _extension() -> list[tuple[str, str]]:
    if not _library.loaded():
        return [("extension", f"not loaded: {_library.load_error}"), ("file", _library.path or "none")]
    build = facts(_library.path)
    rows = [("extension", "loaded"), ("file", _library.path or "")]
    if build:
        rows.append(("built", f"version {build['version']} with torch {build['torch']}, {build['flags']}"))
    if build.get("version") != __version__:
        stale = f"WARNING: the extension is of version {build.get('version')}; {_library.BUILD_HINT}"
        rows.append(("", stale))
    return rows


def _device(kind: str) -> torch.device | None:
    """The device of a kind that a process here would use; None where there is none."""
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return torch.device(kind)


def _who(op: Op, style: Style, device: torch.device) -> tuple[str, str]:
    """Who serves an op in a style on a device, and why; for which calls, where they are several. Verifies nothing."""
    raced = device.type != "cuda" or torch.cuda.is_available()
    known = list(races.calls(op, device, style)) if raced else []
    unraced = [Call(device, variant, style=style) for variant in dict.fromkeys((*op.replaces_many, ""))]
    served: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for call in known or unraced:
        winner = op.wanted(call)
        served.setdefault(winner.backend, []).append(call.cell or "others")
        reasons[winner.backend] = f"{winner.why}, kernel {winner.gain}" if winner.gain else winner.why
    if len(served) == 1:
        return next(iter(served)), next(iter(reasons.values()))
    most, fewer = sorted(served, key=lambda backend: len(served[backend]), reverse=True)
    if len(set(reasons.values())) == 1:
        return f"{most}, or {fewer}", f"{reasons[most]}; {fewer} for {', '.join(served[fewer])}"
    words = (f"{backend} for {', '.join(served[backend])} ({reasons[backend]})" for backend in (most, fewer))
    return f"{most}, or {fewer}", "; ".join(words)


def _state(op: Op, kind: str, verdicts: dict[str, Verdict]) -> tuple[str, str, str]:
    """Who serves eager calls of an op on devices of a kind, who serves inside graphs, and why; verifies nothing."""
    if op.kernel(kind) == "reference":
        missing = "plain layers, fused by torch.compile" if _library.loaded() else "the extension is not loaded"
        return "reference", "reference", missing
    verdict = verdicts.get(op.name)
    if verdict is not None and not verdict.passed:
        why = f"the {verdict.backend} kernel is WRONG here: {verdict.words()}; please report it"
        return "reference", "reference", why
    device = _device(kind) or torch.device(kind)
    (eager, why), (graph, inside) = _who(op, "eager", device), _who(op, "graph", device)
    words = [why] if inside == why else [f"eager calls: {why}", f"graphs: {inside}"]
    if op.kernel(kind) in f"{eager} {graph}":
        words.append(verdict.words() if verdict else "verified at first use")
    return eager, graph, "; ".join(words)


def _verdicts(kind: str) -> dict[str, Verdict]:
    """What is known of the kernels on this machine's device of a kind, by op."""
    device = _device(kind)
    return {} if device is None else by_op(known_verdicts(REGISTRY, device))


def _ops() -> str:
    """The table of who serves each op."""
    body: list[tuple[str, ...]] = []
    verdicts = {kind: _verdicts(kind) for kind in ("cpu", "cuda")}
    for op in REGISTRY.values():
        for kind, exists in op.available.items():
            try:
                forced = op.forced(kind)
                cells = _state(op, kind, verdicts[kind]) if forced is None else (forced, forced, "forced")
            except RuntimeError as missing:
                cells = ("nothing", "nothing", str(missing))
            body.append((op.name if kind == "cpu" else "", kind, ", ".join(exists), *cells))
    return terminal_table(["op", "device", "exists", "serves", "in graphs", "why"], body, color=False)


def _served() -> list[tuple[str, str]]:
    """For each kind of device that is here, how many ops kernels serve in eager calls, and which kernels are wrong."""
    lines: list[tuple[str, str]] = []
    for kind, words in (("cpu", "on the CPU"), ("cuda", "on the GPU")):
        if _device(kind) is None:
            continue
        verdicts = _verdicts(kind)
        states = [_state(op, kind, verdicts)[0] for op in REGISTRY.values()]
        kernels = sum(state != "reference" for state in states)
        text = f"{words}, kernels serve {kernels} of {len(states)} ops, the reference serves the others"
        wrong = [name for name, verdict in verdicts.items() if not verdict.passed and name in REGISTRY]
        text += f"; WRONG here, and therefore not used: {', '.join(wrong)}; please report it" if wrong else ""
        lines.append(("" if lines else "ops", text))
    return lines


def _raced(kind: str) -> str:
    """What is known of races on this machine's device of a kind, in a sentence."""
    device = _device(kind)
    if device is None:
        return "GPU kernels are verified on your card at first use; they have not yet been raced on one"
    own, path = races.read(device), cache.file_of("raced", device)
    if own.get("ops"):
        stale = [name for name, entry in own["ops"].items()
                 if name not in REGISTRY or entry.get("sources") != REGISTRY[name].sources_digest(kind)]  # fmt: skip
        told = f"{kind}: raced on this machine on {own['date']}, {len(own['ops'])} ops, {path}"
        if stale:
            told += f"; STALE for {', '.join(stale)}, whose sources have changed: run `purify-fast tune`"
        return told
    near = races.nearest(cache.machine(device))
    if near is None:
        return f"{kind}: nothing was raced on this card, nor on one like it: run `purify-fast tune`"
    return (
        f"{kind}: not raced on this machine; what was measured on {near['machine']['device']} on {near['date']} holds "
        "until `purify-fast tune` is run"
    )


def other_copies() -> list[Path]:
    """The folders of other copies of the package that Python would find if it were not for this one."""
    this = Path(__file__).resolve().parents[1]
    # an editable installation has a finder of its own; old ones know find_module alone, which Python itself passes over
    finders = [getattr(it, "find_spec", None) for it in sys.meta_path if it is not importlib.machinery.PathFinder]
    specs = [find("purify_fast", None) for find in finders if find is not None]
    specs += [importlib.machinery.PathFinder.find_spec("purify_fast", [entry or os.getcwd()]) for entry in sys.path]
    folders = [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin is not None]
    return [folder for folder in dict.fromkeys(folders) if folder != this]


def copy() -> str:
    """Where the copy is that this describes, and which others it hides."""
    this = Path(__file__).resolve().parents[1]
    others = ", ".join(map(str, other_copies()))
    if not others:
        return str(this)
    if this.parent == Path.cwd():
        return (
            f"{this}, because it is in the current folder, where `python -m` looks first. It hides the copy in "
            f"{others}: run `purify-fast info`, or start in another folder, to hear of that one"
        )
    return f"{this}. It comes first on Python's path (sys.path), and hides the copy in {others}"


def report() -> str:
    """Versions, machine, build, environment, and the table op x backend, as text."""
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("PURIFY_FAST_")]
    head = [
        ("purify_fast", __version__),
        ("this copy", copy()),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", _triton()),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("CPU", _cpu()),
        ("GPU", _gpu()),
        *_extension(),
        ("verdicts", f"{cache.folder()}; PURIFY_FAST_VERIFY={mode()}"),
        ("races", _raced("cpu")),
        ("", _raced("cuda")),
        ("environment", " ".join(settings) or "no PURIFY_FAST_*"),
    ]
    return f"{_wrapped(head)}\n\n{_ops()}"


def summary() -> str:
    """The same in a few lines: versions, the devices, how many ops kernels serve there, and what is wrong."""
    triton = _triton()
    head = [
        ("purify_fast", f"{__version__}, with PyTorch {torch.__version__} and Python {platform.python_version()}"),
        ("this copy", copy()),
        ("CPU", _cpu()),
        ("GPU", _gpu()),
        *([("Triton", triton)] if "WARNING" in triton else []),
        *((name, text) for name, text in _extension() if name in ("extension", "")),
        *_served(),
        ("more", "`purify-fast info --all` says who serves which op and why; `purify-fast tune` finds who is fastest"),
    ]
    return _wrapped(head)


def _wrapped(head: list[tuple[str, str]]) -> str:
    """Names and values below each other; long values go on in the next line."""
    unbroken = textwrap.TextWrapper(110, subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False)
    return "\n".join(unbroken.fill(name.ljust(14) + value) for name, value in head)
