"""What is installed, what was built, and which backend serves each op: ``purify-fast info``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import textwrap
from pathlib import Path

import torch

from .. import _library
from .._version import __version__
from ..ops import REGISTRY
from ..ops._op import Op
from ..ops._verdicts import Verdict, folder
from ..ops._verify import kept_verdicts, mode

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = values.get("flags", "").split()
    return f"{values.get('model name', platform.machine())}, {', '.join(f for f in _CPU_FLAGS if f in flags) or '-'}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)


def facts(extension: str | Path | None) -> dict[str, str | None]:
    """What setup.py recorded beside an extension; empty if there is no record."""
    if extension is None:
        return {}
    try:
        return json.loads(Path(extension).with_name("_build.json").read_text())
    except (OSError, ValueError):
        return {}


def cuda_part(found: dict[str, str | None]) -> str:
    """What an extension with these `facts` has for GPUs."""
    return f"CUDA {found['cuda']} for {found['archs']}" if found.get("cuda") else "no CUDA kernels"


def _extension() -> list[tuple[str, str]]:
    if not _library.loaded():
        return [("extension", f"not loaded: {_library.load_error}"), ("file", _library.path or "none")]
    found = facts(_library.path)
    rows = [("extension", f"loaded, {cuda_part(found)}"), ("file", _library.path or "")]
    if found:
        rows.append(("built", f"version {found['version']} with torch {found['torch']}, {found['flags']}"))
        if found["version"] != __version__:
            rows.append(("", f"WARNING: the extension is of version {found['version']}; {_library.BUILD_HINT}"))
    if not found.get("cuda"):
        rows.append(("CUDA kernels", "build with `PURIFY_FAST_BUILD=cuda`; needs a CUDA toolkit (CUDA_HOME), no GPU"))
    return rows


def _device(kind: str) -> torch.device | None:
    """The device of a kind that a process here would use; None where there is none."""
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return torch.device(kind)


def _state(op: Op, kind: str, verdicts: dict[str, Verdict]) -> tuple[str, str, str]:
    """Who serves eager calls of an op on devices of a kind, who serves inside graphs, and why; verifies nothing."""
    device = _device(kind) or torch.device(kind)
    eager, graph = op.wanted("eager", device), op.wanted("graph", device)
    if op.kernel(kind) == "reference":
        missing = {"cpu": "the extension is not loaded", "cuda": "its CUDA kernel is not built"}
        known = kind == "cuda" or not _library.loaded()
        return eager.backend, graph.backend, missing[kind] if known else "plain layers, fused by torch.compile"
    found, why = verdicts.get(op.name), [eager.why]
    if found is not None and not found.passed:
        return "reference", "reference", f"the {found.backend} kernel is WRONG here: {found.words()}; please report it"
    for variant in filter(None, op.replaces_many):
        calls, inside = op.wanted("eager", device, variant), op.wanted("graph", device, variant)
        if (calls.backend, inside.backend) != (eager.backend, graph.backend):
            why.append(f"{variant}: {calls.backend}, in graphs {inside.backend}, {calls.why}")
    if op.kernel(kind) in " ".join([eager.backend, graph.backend, *why[1:]]):
        why.append(found.words() if found else "verified at first use")
    return eager.backend, graph.backend, "; ".join(why)


def _ops() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("op", "device", "exists", "serves", "in graphs", "why")]
    devices = {kind: _device(kind) for kind in ("cpu", "cuda")}
    verdicts = {kind: {} if device is None else kept_verdicts(device) for kind, device in devices.items()}
    for op in REGISTRY.values():
        for kind, exists in op.available.items():
            forced = op.forced(kind)
            if forced is None:
                cells = _state(op, kind, verdicts[kind])
            elif forced:
                cells = (forced, forced, "forced")
            else:
                cells = ("nothing", "nothing", op.missing(kind))
            rows.append((op.name if kind == "cpu" else "", kind, ", ".join(exists), *cells))
    return rows


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def report() -> str:
    """Versions, machine, build, environment, and the table op x backend, as text."""
    threads = torch.get_num_threads()
    head = [
        ("purify_fast", f"{__version__}, {Path(__file__).parents[1]}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", _version("triton")),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{_cpu()}; {threads} thread{'s' if threads != 1 else ''}"),
        ("GPU", _gpu()),
        *_extension(),
    ]
    head.append(("verdicts", f"{folder()}; PURIFY_FAST_VERIFY={mode()}"))
    if not torch.cuda.is_available():
        head.append(("", "GPU kernels are verified on your card at first use; they have not yet been raced on one"))
    settings = {key: value for key, value in sorted(os.environ.items()) if key.startswith("PURIFY_FAST_")}
    head.append(("environment", " ".join(f"{key}={value}" for key, value in settings.items()) or "no PURIFY_FAST_*"))
    lines = []
    for name, value in head:
        lines += textwrap.wrap(
            value,
            110,
            initial_indent=name.ljust(14),
            subsequent_indent=" " * 14,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", *_columns(_ops())])


if __name__ == "__main__":
    print(report())
