"""python -m benchmarks ops [names...] [--device cpu|cuda] [--quick] [--out DIR]

python -m benchmarks pipelines [names...] [--device cpu|cuda] [--quick] [--out DIR]

python -m benchmarks study NAME [--data DIR] [--full] [--quick]

python -m benchmarks report [DIR...]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from purify_fast.training import keep_memory

from . import measure, pipelines, race, report
from .ops import registry
from .studies import command, tables

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def device_class(device: torch.device) -> str:
    """The folder of a device's results: cpu, or the GPU's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def folder(device: torch.device, quick: bool) -> Path:
    """Where results go if nothing else is said."""
    return (Path("runs/benchmarks") if quick else RESULTS) / device_class(device)


def run_ops(names: list[str], device: torch.device, quick: bool, out: Path | None) -> Path:
    """Measure, and write after every op; rows of ops that are not named stay."""
    out = folder(device, quick) if out is None else out
    effort = measure.QUICK if quick else measure.Effort()
    ops = registry()
    work = []
    for name in names:
        cases = ops[name]()
        variants = {case.variant: case for case in reversed(cases)}  # quick: the first of each
        for case in variants.values() if quick else cases:
            work += [(name, case, direction, style) for direction in case.directions for style in measure.STYLES]
    path = out / report.ROWS
    done = {name: [] for name in ops}
    for row in report.read_csv(path) if path.exists() else []:
        done.setdefault(row["op"], []).append(row)
    fresh: dict[str, list[dict]] = {name: [] for name in names}
    with tqdm(work, unit="row", file=sys.stderr, disable=None) as progress:
        for index, (name, case, direction, style) in enumerate(progress):
            progress.set_description(f"{name} {case.variant} {direction} {style}", refresh=True)
            fresh[name].append(measure.measure(name, case, direction, style, device, effort))
            if index + 1 == len(work) or work[index + 1][0] != name:
                done[name] = fresh[name]
                report.write_csv(path, [row for rows in done.values() for row in rows])
                report.report(out)
    return out


def run_pipelines(names: list[str], device: torch.device, quick: bool, out: Path | None) -> Path:
    """Race, and write after every case; rows of pipelines that are not named stay."""
    out = folder(device, quick) if out is None else out
    work = [(name, *case) for name in names for case in pipelines.registry()[name](quick).items()]
    path = out / report.PIPELINES
    kept = [row for row in (report.read_csv(path) if path.exists() else []) if row["pipeline"] not in names]
    with tqdm(work, unit="case", file=sys.stderr, disable=None) as progress:
        for name, case_name, case in progress:
            kept += race.race(name, case_name, case, device, quick, progress.set_description)
            report.write_csv(path, kept)
            report.report_pipelines(out)
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for kind, known, text in (
        ("ops", registry(), "the ops against their references"),
        ("pipelines", pipelines.registry(), "what users run end to end, against a plain implementation"),
    ):
        one = commands.add_parser(kind, help=text)
        one.add_argument("names", nargs="*", metavar="name", help=f"which; all by default: {', '.join(known)}")
        one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        one.add_argument(
            "--quick", action="store_true", help="small, three short runs at most: that it works, no numbers"
        )
        one.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    command.add_arguments(commands.add_parser("study", help="what makes a defence robust: trains and attacks models"))
    redo = commands.add_parser("report", help="the tables and pictures again, from the CSV files")
    redo.add_argument("folders", nargs="*", type=Path, help="benchmarks/results/* by default")
    chosen = parser.parse_args(arguments)
    if chosen.command == "study":
        print(command.main(chosen).read_text())
        return
    if chosen.command == "report":
        for path in chosen.folders or sorted({path.parent for path in RESULTS.glob("*/*.csv")}):
            if (path / report.ROWS).exists():
                report.report(path)
                print(path / report.TABLE)
            if (path / report.PIPELINES).exists():
                report.report_pipelines(path)
                print(path / report.PIPELINES_TABLE)
        for page in sorted(DOCS.glob("*.md")):
            for name in tables.fill(page, command.RESULTS):
                print(f"{page} wants the table of {name}, which no study has written yet", file=sys.stderr)
        return
    known = registry() if chosen.command == "ops" else pipelines.registry()
    unknown = set(chosen.names) - set(known)
    if unknown:
        kind = chosen.command.removesuffix("s")
        parser.error(f"no such {kind}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    if chosen.command == "pipelines":
        out = run_pipelines(chosen.names or list(known), device, chosen.quick, chosen.out)
        print((out / report.PIPELINES_TABLE).read_text())
        return
    keep_memory()
    out = run_ops(chosen.names or list(registry()), device, chosen.quick, chosen.out)
    for line in report.read_csv(out / report.VERDICTS):
        name = f"{line['op']} {line['direction']}, eager calls on {device.type}"
        worst = f"{line['behind_eager']} rows behind, worst ratio {line['worst_ratio']}: {line['worst_row']}"
        print(f"{name}: served by {line['eager_calls']} ({worst})")
    print(out / report.TABLE)


if __name__ == "__main__":
    main()
