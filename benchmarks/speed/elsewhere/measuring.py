"""Measure the loops of other people: the time of each contestant, and how far its results are from theirs.

A time is processor time in one thread. The contestants of a row take turns in one process. The command also measures
attacks on small networks (`small_networks`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from purify_fast.speed import retain_freed_memory

from ... import options
from .. import sheets, timing
from ..pipelines.expert import DTYPES
from . import Batches, Dtype, Row, changed_lines, registry, small_networks

CONTESTANTS = ("theirs", "expert", "ours", "compiled")
#: The contestants whose lines and results are compared with theirs.
CHANGED = ("expert", "ours")
#: The results of processors that have AVX2 alone are in a file of their own.
FILES = "elsewhere.csv", "elsewhere_avx2.csv"
#: The least and the most rounds of a row, and the seconds after which no round begins that is not needed.
LEAST, MOST, SECONDS = 5, 9, 75.0
#: What is compared in the first step.
COMPARED = ("logits", "loss", "gradients")


class Contest:
    """A contestant of a row, which has its own copy of the model."""

    def __init__(self, row: Row, who: str, dtype: Dtype, small: bool):
        self.row, self.who, self.model, self.original = row, who, row.network(small), row.network(small)
        if who == "compiled":
            for part in row.parts(self.model):
                part.compile(dynamic=False)
        self.batches = row.batches(self.original, 8 if small else 32)
        self.x, self.y = next(self.batches)
        self.steps = row.form(who).program(self.model, self._present_batch(), dtype)

    def _present_batch(self) -> Batches:
        while True:
            yield self.x, self.y

    def step(self, seed: int) -> float:
        """Take a step, and return its seconds of processor time. The next step gets new images."""
        torch.manual_seed(seed)
        trace = sys.gettrace()
        with contextlib.redirect_stdout(io.StringIO()):
            began = time.process_time()
            self.result = next(self.steps)
            seconds = time.process_time() - began
        # The package pyautoattack replaces Python's trace function.
        sys.settrace(trace)
        self.loss = self._loss()
        self.x, self.y = next(self.batches)
        return seconds

    def _loss(self) -> Tensor:
        """Return the loss of a step. That of an attack is the cross-entropy of the unchanged model."""
        if self.row.trains:
            return self.result
        torch.manual_seed(0)
        with torch.no_grad():
            return F.cross_entropy(self.original(self.result), self.y)

    def first(self) -> dict[str, Tensor]:
        """Take the first step, and return its loss, and the gradients of the weights, or those of images for an attack.

        The logits are those before the step. The expert's copy is not the model, so its logits and gradients of images
        are left out.
        """
        found = {}
        if self.who in ("theirs", "ours"):
            torch.manual_seed(0)
            leaf = self.x.clone().requires_grad_()
            logits = self.model.eval()(leaf)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self.y), leaf)
            found = {"logits": logits.detach(), "gradients": gradient}
        self.step(0)
        if self.row.trains:
            weights = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            found["gradients"] = torch.cat(weights)
        return found | {"loss": self.loss}


def difference(one: Tensor, theirs: Tensor) -> str:
    """Return the largest difference of two tensors, divided by the largest number of the second."""
    return f"{float((one.double() - theirs.double()).abs().max() / theirs.double().abs().max()):.2e}"


def measured(name: str, row: Row, quick: bool) -> dict[str, Any]:
    """Measure a row, and return its line of the results file. A contestant that fails has no numbers."""
    # The networks of all rows share code, of which PyTorch keeps few compiled forms.
    torch.compiler.reset()
    contests, firsts = dict[str, Contest](), dict[str, dict[str, Tensor]]()
    for who in CONTESTANTS:
        try:
            contest = Contest(row, who, torch.float32 if quick else "auto", quick)
            firsts[who], contests[who] = contest.first(), contest
        except Exception:
            if who == "theirs":
                raise
            print(f"{name}, {who}: {traceback.format_exc()}", file=sys.stderr)
    times: dict[str, list[float]] = {who: [] for who in contests}
    began, least, most = time.monotonic(), *((1, 1) if quick else (LEAST, MOST))
    for done in range(most):
        if done >= least and time.monotonic() > began + SECONDS:
            break
        for who, contest in contests.items():
            times[who].append(contest.step(done + 1))
    found: dict[str, Any] = {"row": name, "images": row.images, "rounds": len(times["theirs"])}
    for who in CONTESTANTS:
        found[f"{who}_ms"] = f"{1e3 * statistics.median(times[who]):.2f}" if who in times else ""
    for who in CHANGED:
        found[f"lines_{who}"] = changed_lines(row.theirs, row.form(who))
        one, theirs = firsts.get(who, {}), firsts["theirs"]
        found |= {f"{key}_{who}": difference(one[key], theirs[key]) if key in one else "" for key in COMPARED}
    found |= {
        "bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "expert_dtype": str(DTYPES["cpu"]).removeprefix("torch."),
    }
    return found | timing.environment(torch.device("cpu"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks elsewhere``."""
    options.add_names(parser, [*registry(), small_networks.NAME])
    options.add_out(parser, "/cpu")
    parser.add_argument("--resume", action="store_true", help="keep the rows that have a time of each implementation")


def main(chosen: argparse.Namespace) -> str:
    """Run ``python -m benchmarks elsewhere``, and return the tables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    retain_freed_memory()
    limited = torch.backends.cpu.get_cpu_capability() == "AVX2"
    path = options.out_of(chosen, chosen.quick, "cpu") / FILES[limited]
    kept = {row["row"]: row for row in sheets.rows_of(path)}
    rows = registry()
    done = {name for name, row in kept.items() if chosen.resume and all(row[f"{who}_ms"] for who in CONTESTANTS)}
    left = [name for name in rows if name in chosen.names and name not in done]
    # PyTorch asks the processor for these, even if PyTorch is limited to AVX2.
    absent = {f"_is_{name}_supported": lambda: False for name in ("avx512_bf16", "amx_tile")}
    processor = mock.patch.multiple(torch.cpu, create=True, **absent) if limited else contextlib.nullcontext()
    with processor, torch.compiler.set_stance("force_eager" if chosen.quick else "default"):
        for name in tqdm(left, desc="elsewhere", unit=" rows"):
            if rows[name].package and find_spec(rows[name].package) is None:
                print(f"{name}: the package {rows[name].package} is not installed", file=sys.stderr)
                continue
            kept[name] = measured(name, rows[name], chosen.quick)
            sheets.write_csv(path, [kept[each] for each in rows if each in kept])
    if limited:
        print("no small networks are measured: their file belongs to AVX-512", file=sys.stderr)
    else:
        small_networks.run(chosen.names, chosen.quick, path.parent, chosen.resume)
    torch.set_num_threads(threads)
    return "\n".join([*_table(sheets.rows_of(path)), "", *small_networks.table(path.parent)])


def _table(rows: list[dict[str, str]]) -> list[str]:
    def ratio(row: dict[str, str], who: str) -> str:
        return f"{float(row[who]) / float(row['ours_ms']):.2f}" if row[who] and row["ours_ms"] else "-"

    body = []
    for row in rows:
        times = [f"{float(row[f'{who}_ms']):,.0f}" if row[f"{who}_ms"] else "-" for who in CONTESTANTS]
        ratios = [f"**{ratio(row, 'theirs_ms')}**", ratio(row, "expert_ms")]
        body.append([row["row"], row["images"], *times, *ratios, row["lines_ours"], row["lines_expert"], row["rounds"]])
    head = ["loop", "images", "theirs, ms", "expert, ms", "purify_fast, ms", "theirs compiled, ms"]
    head += ["theirs / purify_fast", "expert / purify_fast", "changed lines", "lines of the expert", "rounds"]
    return sheets.table(head, body)


def table(results: Path) -> list[str]:
    """Return the tables of docs/speed.md, one for each kind of processor."""
    lines: list[str] = []
    for file in FILES:
        if rows := sheets.rows_of(results / "cpu" / file):
            with_or_without = "with" if rows[0]["bfloat16"] == "True" else "without"
            kind = f"{with_or_without} instructions for bfloat16; the expert computes in {rows[0]['expert_dtype']}"
            lines += [f"{sheets.measured_on(rows, 'row').removesuffix('.')}, {kind}.", "", *_table(rows), ""]
    return lines[:-1] or ["Nothing has been measured yet."]
