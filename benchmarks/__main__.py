"""python -m benchmarks ops [names...] [--device cpu|cuda] [--quick] [--out DIR]

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

from . import measure, report
from .ops import registry

RESULTS = Path(__file__).parent / "results"


def device_class(device: torch.device) -> str:
    """The folder of a device's results: cpu, or the GPU's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def run_ops(names: list[str], device: torch.device, quick: bool, out: Path | None) -> Path:
    """Measure, and write after every op; rows of ops that are not named stay."""
    if out is None:
        out = (Path("runs/benchmarks") if quick else RESULTS) / device_class(device)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="the ops against their references")
    ops.add_argument("names", nargs="*", metavar="name", help=f"which; all by default: {', '.join(registry())}")
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ops.add_argument(
        "--quick", action="store_true", help="one shape per op, three short runs: that it works, no numbers"
    )
    ops.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    tables = commands.add_parser("report", help="the tables and pictures again, from the CSV files")
    tables.add_argument("folders", nargs="*", type=Path, help="benchmarks/results/* by default")
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        for folder in chosen.folders or sorted(path.parent for path in RESULTS.glob(f"*/{report.ROWS}")):
            report.report(folder)
            print(folder / report.TABLE)
        return
    unknown = set(chosen.names) - set(registry())
    if unknown:
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(registry())}")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    keep_memory()
    out = run_ops(chosen.names or list(registry()), device, chosen.quick, chosen.out)
    for line in report.read_csv(out / report.VERDICTS):
        name = f"{line['op']} {line['direction']}, eager calls on {device.type}"
        worst = f"{line['behind_eager']} rows behind, worst ratio {line['worst_ratio']}: {line['worst_row']}"
        print(f"{name}: served by {line['eager_calls']} ({worst})")
    print(out / report.TABLE)


if __name__ == "__main__":
    main()
