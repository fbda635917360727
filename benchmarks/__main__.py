"""python -m benchmarks ops [names...] [--device cpu|cuda] [--quick] [--out DIR]

python -m benchmarks pipelines [names...] [--device cpu|cuda] [--quick] [--out DIR] [--before FILE]

python -m benchmarks convolutions [--runs N]

python -m benchmarks evaluation [names...] [--models DIR] [--data DIR] [--images N] [--rounds N] [--quick] [--out DIR]

python -m benchmarks study NAME [--data DIR] [--full] [--quick]

python -m benchmarks gpu_check [tests|ops|pipelines...] [--dry] [--out DIR] [--data DIR] [--only SECTION...] [--redo]

python -m benchmarks instructions

python -m benchmarks captures [--images N] [--data DIR] [--redo] [--out DIR]

python -m benchmarks roofline [--out DIR]

python -m benchmarks ship [--device cpu|cuda]

python -m benchmarks zoo NAME[=FOLDER]... [--images N] [--data DIR]

python -m benchmarks report [DIR...] [--count] [--check]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from purify_fast._lock import FolderInUse
from purify_fast.speed import retain_freed_memory

from . import (
    captures,
    convolutions,
    evaluation,
    front_page,
    gpu_check,
    instructions,
    launches,
    measure,
    pages,
    performance,
    pipelines,
    report,
    roofline,
    served,
    shipping,
    zoo,
)
from .ops import registry
from .running import RESULTS, folder, run_ops, run_pipelines
from .studies import command
from .studies.cifar10_results import OtherBudget
from .studies.cifar10_table import NothingJudged

DOCS = Path(__file__).parents[1] / "docs"


def evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks evaluation``."""
    known = "; ".join(evaluation.CONTESTS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which contests; all by default: {known}")
    models = "the trained models of `make demo`; missing ones are trained there; runs/demo by default"
    parser.add_argument("--models", type=Path, default=evaluation.MODELS, help=models)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz or the official files, for the ResNet-18")
    parser.add_argument("--images", type=int, help="at most so many images of each contest")
    parser.add_argument("--rounds", type=int, default=1, help="how often every contestant runs; 1 by default")
    parser.add_argument("--quick", action="store_true", help="tiny: that it works, no numbers")
    parser.add_argument("--redo", action="store_true", help="also what is done already")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/studies by default")


def run_evaluation(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """Check the options, run the contests and print their table."""
    unknown = set(chosen.names) - set(evaluation.CONTESTS)
    if unknown:
        known = "; ".join(evaluation.CONTESTS)
        parser.error(f"no such contest: {', '.join(sorted(unknown))}; there are {known}")
    for name, value in (("--images", chosen.images), ("--rounds", chosen.rounds)):
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    amount = replace(evaluation.QUICK if chosen.quick else evaluation.Amount(), rounds=chosen.rounds)
    if chosen.images is not None:
        amount = replace(amount, images=chosen.images)
    out = chosen.out or (Path("runs/benchmarks") if chosen.quick else RESULTS / "studies")
    sources = evaluation.Sources(chosen.models, chosen.data)
    print(evaluation.main(chosen.names, sources, amount, out, chosen.redo).read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for kind, known, text in (
        ("ops", registry("cuda"), "the ops against their references"),
        ("pipelines", pipelines.registry(), "what users run end to end, against a plain implementation"),
    ):
        one = commands.add_parser(kind, help=text)
        one.add_argument("names", nargs="*", metavar="name", help=f"which; all by default: {', '.join(known)}")
        one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        one.add_argument(
            "--quick", action="store_true", help="small, three short runs at most: that it works, no numbers"
        )
        one.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
        if kind == "pipelines":
            earlier = "in place of the contest: ours served as this earlier races.json says, and as today, in turn"
            one.add_argument("--before", type=Path, metavar="FILE", help=earlier)
        if kind == "ops":
            one.add_argument("--fast", action="store_true", help="every row, timed once in place of up to three times")
            one.add_argument(
                "--style",
                choices=measure.STYLES,
                help="only calls from Python (eager) or only those inside a compiled graph; both by default",
            )
    layers = commands.add_parser("convolutions", help="the layers of AToP's generator, ours against PyTorch's")
    layers.add_argument("--runs", type=int, default=15, help="how often every contestant runs; 15 by default")
    command.add_arguments(commands.add_parser("study", help="what makes a defence robust: trains and attacks models"))
    check = commands.add_parser("gpu_check", help="what only a GPU can tell: three commands of nine minutes, resumably")
    check.add_argument("parts", nargs="*", metavar="part",
                       help=f"which of {', '.join(gpu_check.PARTS)}; all in turn by default")  # fmt: skip
    check.add_argument("--dry", action="store_true", help="rehearse every section on the CPU, small: no numbers")
    check.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    check.add_argument("--only", nargs="+", choices=gpu_check.SECTIONS, default=[], metavar="section",
                       help=f"which; all by default: {', '.join(gpu_check.SECTIONS)}")  # fmt: skip
    check.add_argument("--redo", action="store_true", help="also what is done already")
    check.add_argument("--seconds", type=float, help="the limit of each section in place of its own")
    check.add_argument("--total", type=float, help="seconds for all of them; 540 for each of the three by default")
    check.add_argument("--data", type=Path, help="folder with CIFAR-10, or an .npz file; the current folder by default")
    commands.add_parser("instructions", help="the GPU kernels' machine code, counted without a GPU")
    captured = commands.add_parser("captures", help="what an evaluation captures on a GPU, counted without one")
    captured.add_argument("--images", type=int, default=captures.IMAGES, help="of each evaluation; 1000 by default")
    captured.add_argument("--data", default="data", help="folder with cifar10.npz or the official files")
    captured.add_argument("--redo", action="store_true", help="also what is counted already")
    captured.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    model = commands.add_parser("roofline", help="how long steps should take on an H100: a model, counted")
    model.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    ship = commands.add_parser("ship", help="let what purify-fast tune found on this machine ship with the package")
    ship.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    against = commands.add_parser("evaluation", help="our attacks against the official AutoAttack: strength and time")
    evaluation_arguments(against)
    zoo.add_arguments(commands.add_parser("zoo", help="pack trained models into the zoo, and write their cards"))
    redo = commands.add_parser("report", help="the tables and pictures again, from the CSV files")
    redo.add_argument("folders", nargs="*", type=Path, help="benchmarks/results/* by default")
    redo.add_argument("--count", action="store_true", help="also count again what a training step launches")
    redo.add_argument("--check", action="store_true", help="write nothing: do README and docs agree with the results?")
    chosen = parser.parse_args(arguments)
    if chosen.command == "evaluation":
        run_evaluation(parser, chosen)
        return
    if chosen.command == "convolutions":
        try:
            convolutions.check(chosen.runs)
        except ValueError as error:
            parser.error(str(error))
        print(convolutions.main(chosen.runs))
        return
    if chosen.command == "study":
        try:
            command.check(chosen)
        except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
            parser.error(str(error))
        try:
            page = command.main(chosen)
        except (NothingJudged, OtherBudget) as error:
            parser.error(str(error))
        print(page.read_text())
        return
    if chosen.command == "zoo":
        try:
            zoo.main(chosen)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        return
    if chosen.command == "captures":
        if chosen.images < 1:
            parser.error(f"--images must be at least 1, got {chosen.images}")
        print(captures.write(chosen.out, chosen.images, chosen.data, chosen.redo))
        return
    if chosen.command == "roofline":
        print(roofline.write(chosen.out))
        return
    if chosen.command == "instructions":
        print(instructions.write(RESULTS))
        return
    if chosen.command == "report" and chosen.check:
        found = pages.check(RESULTS)
        print("\n".join(found) or "README and docs agree with the results files; their local links lead somewhere")
        sys.exit(bool(found))
    if chosen.command == "report":
        for path in chosen.folders:
            if not any((path / name).exists() for name in (report.ROWS, report.PIPELINES)):
                parser.error(f"{path} holds neither {report.ROWS} nor {report.PIPELINES}")
        for path in chosen.folders or sorted({path.parent for path in RESULTS.glob("*/*.csv")}):
            if (path / report.ROWS).exists():
                report.report(path)
                print(path / report.TABLE)
            if (path / report.PIPELINES).exists():
                report.report_pipelines(path)
                print(path / report.PIPELINES_TABLE)
        if chosen.count:
            print(launches.write(RESULTS))
        print(performance.write(RESULTS, DOCS))
        print(shipping.write_races(RESULTS))
        front_page.picture(RESULTS, DOCS / "pictures" / "claim.png")
        for page in pages.every_page():
            for name in pages.fill(page, RESULTS):
                print(f"{page} wants the table {name}, whose results are not there yet", file=sys.stderr)
        return
    if chosen.command == "ship":
        device = torch.device(chosen.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            parser.error("no CUDA device is available")
        try:
            print(shipping.take(device, folder(device, False)))
        except FileNotFoundError as error:
            parser.error(str(error))
        print(shipping.write_races(RESULTS))
        print(performance.write(RESULTS, DOCS))
        return
    if chosen.command == "gpu_check":
        for name, value in (("--seconds", chosen.seconds), ("--total", chosen.total)):
            if value is not None and not value > 0:
                parser.error(f"{name} must be above 0, got {value:g}")
        device = torch.device("cpu" if chosen.dry else "cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            why = gpu_check.why_no_device()
            parser.error(f"no CUDA device is available: {why}; --dry rehearses everything on the CPU")
        out = chosen.out or folder(device, chosen.dry)
        unknown = set(chosen.parts) - set(gpu_check.PARTS)
        if unknown:
            known = ", ".join(gpu_check.PARTS)
            parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {known}")
        parts = chosen.parts or list(gpu_check.PARTS)
        only = chosen.only or [name for part in parts for name in gpu_check.PARTS[part]]
        total = chosen.total or sum(gpu_check.TOTALS[part][chosen.dry] for part in parts)
        limits = chosen.redo, chosen.seconds, total, chosen.data
        sys.exit(not gpu_check.main(out, device, chosen.dry, only, *limits))
    known = registry(chosen.device) if chosen.command == "ops" else pipelines.registry()
    unknown = set(chosen.names) - set(known)
    if unknown:
        kind = chosen.command.removesuffix("s")
        parser.error(f"no such {kind}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available")
    out = chosen.out or folder(device, chosen.quick)
    if chosen.command == "pipelines" and chosen.before:
        try:
            print(served.compare(chosen.before, chosen.names or list(known), chosen.quick, out).read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--before: {error}")
        return
    if chosen.command == "pipelines":
        run_pipelines(chosen.names or list(known), device, chosen.quick, out)
        print((out / report.PIPELINES_TABLE).read_text())
        return
    retain_freed_memory()
    effort = measure.FAST if chosen.fast and not chosen.quick else None
    styles = (chosen.style,) if chosen.style else measure.STYLES
    run_ops(chosen.names or list(known), device, chosen.quick, out, effort=effort, styles=styles)
    for line in report.read_csv(out / report.VERDICTS):
        name = f"{line['op']} {line['direction']}, eager calls on {device.type}"
        worst = f"{line['behind_eager']} rows behind, worst ratio {line['worst_ratio']}: {line['worst_row']}"
        print(f"{name}: served by {line['eager_calls']} ({worst})")
    if device.type == "cpu" and any(
        row["style"] == "eager" and row["ratio"] for row in report.read_csv(out / report.ROWS)
    ):
        print(front_page.ops_sentence(out / report.ROWS))
    print(out / report.TABLE)


if __name__ == "__main__":
    try:
        main()
    except FolderInUse as error:
        sys.exit(f"python -m benchmarks: {error}")
