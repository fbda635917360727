"""docs/performance.md: what ops and pipelines must do, the time that takes at most speed, what was measured.

All of it from the committed CSV files and the formulas of the benchmarks.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from purify_fast._files import write_text

from . import captures, instructions, launches, limits, pipelines, report, roofline, shipping
from .measure import AUTOTUNED
from .ops import Case, registry

#: The page in docs that is made here as a whole.
#: What was found by hand on a device, in words; closes its chapter.
NOTES = "notes.md"
PAGE = "performance.md"
#: bytes/s and FLOP/s that stand for an H200-class GPU where none was measured.
ASSUMED = (4.3e12, 790e12)
#: Of the ops' formulas.
SYMBOLS = {
    "n": "elements (of philox and gated_elu of the result, of stitch of the stitched images)",
    "r": "those that are replayed",
    "s": "bytes of an element",
    "B": "images",
    "K": "samples of each",
    "C": "classes or channels",
    "D": "latents",
    "P": "pixels of a channel",
    "N": "parts or passes",
    "T": "proposals of each image",
    "L": "keys",
}
#: Microseconds of these are shown.
KINDS = ("eager", "compile", AUTOTUNED, "ours")


def standard(cases: list[Case]) -> Case:
    """The case that stands for an op: the largest of the first variant and dtype."""
    same = [case for case in cases if (case.variant, case.dtype) == (cases[0].variant, cases[0].dtype)]
    return max(same, key=lambda case: case.count("bytes", "forward"))


def limit(case: Case, direction: str, copied: float | None, multiplied: float | None) -> tuple[float, str] | None:
    """Seconds that nothing can be faster than, and what takes them; None if the bandwidth is not known."""
    if copied is None:
        return None
    moving = case.count("bytes", direction) / copied
    computing = case.count("flops", direction) / multiplied if multiplied else 0.0
    return (moving, "bytes") if moving >= computing else (computing, "FLOP")


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + len(cells) * "---|"]


def _counted(case: Case, what: str, direction: str) -> tuple[str, str]:
    """The formula, or nothing, and the number in millions."""
    formula = getattr(case, what)[direction]
    text = f"`{formula.replace('*', ' ')}`" if isinstance(formula, str) else ""
    return text, f"{case.count(what, direction) / 1e6:,.1f}"


def _shape(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return " ".join(filter(None, (case.variant, "x".join(map(str, case.shape)), dtype)))


def counted() -> list[str]:
    copied, multiplied = ASSUMED
    lines = [
        "## What the ops must do",
        "",
        "Counted, not measured: every input read once, every result written once, at a shape that fills a GPU. The "
        f"limit is the larger of bytes over {copied / 1e12:g} TB/s and FLOP over {multiplied / 1e12:g} TFLOP/s, "
        "**assumed** for an H200-class GPU; arithmetic outside of its matrix units is slower, so it is a lower bound.",
        "",
        f"{'; '.join(f'`{symbol}` {meaning}' for symbol, meaning in SYMBOLS.items())}.",
        "",
        *_head("op", "direction", "at", "bytes", "MB", "FLOP", "M", "limit, us", "by"),
    ]
    for op, cases in registry("cuda").items():
        case = standard(cases())
        for direction in case.directions:
            found = limit(case, direction, copied, multiplied)
            assert found is not None
            cells = (*_counted(case, "bytes", direction), *_counted(case, "flops", direction))
            lines.append(_line(op, direction, _shape(case), *cells, f"{1e6 * found[0]:,.1f}", found[1]))
    return lines


def _rates(folder: Path, rows: list[dict], races: list[dict]) -> dict[str, tuple[float | None, float | None]]:
    """By device: bytes/s of a copy, FLOP/s of a product, each None if it was not measured there."""
    measured = limits.read(folder)
    raced = {
        device: max(1e9 * float(row["matrix_GFLOP_per_s"]) for row in races if row["device"] == device)
        for device in {row["device"] for row in races}
    }
    return {
        device: (measured.get((device, limits.COPY)), measured.get((device, limits.PRODUCT)) or raced.get(device))
        for device in dict.fromkeys(row["device"] for row in (*rows, *races))
    }


def _measured_on(rows: list[dict]) -> str:
    made = (f"{row['date']}, torch {row['torch']}, triton {row['triton'] or 'absent'}" for row in rows)
    return "; ".join(dict.fromkeys(made))


def measured_ops(kind: str, rows: list[dict], rates: dict) -> list[str]:
    columns = [name for name in KINDS if f"{name}_us" in rows[0]]
    lines = [
        "### Ops, called eagerly",
        "",
        "Microseconds, one shape per op; `compile` is what `torch.compile` gives already. The limit is that of the "
        "row's device, where its copy bandwidth was measured. [All shapes](../benchmarks/results/{folder}/ops.md).",
        "",
        *_head("op", "direction", "at", "limit", *columns, "of the limit", "GB/s", "served by", "on"),
    ]
    served = {(line["op"], line["direction"]): line["eager_calls"] for line in report.verdicts(rows)}
    for op, cases in registry(kind).items():
        case = standard(cases())
        wanted = {"op": op, "variant": case.variant, "shape": "x".join(map(str, case.shape)), "style": "eager"}
        wanted["dtype"] = str(case.dtype).removeprefix("torch.")
        for direction in case.directions:
            for row in (r for r in rows if {**wanted, "direction": direction}.items() <= r.items()):
                found = limit(case, direction, *rates[row["device"]])
                most, share = f"{1e6 * found[0]:,.1f}" if found else "-", "-"
                if found and row["ours_us"]:
                    share = f"{100 * 1e6 * found[0] / float(row['ours_us']):.0f} %"
                times = [f"{float(row[f'{c}_us']):,.1f}" if row.get(f"{c}_us") else "-" for c in columns]
                cells = (op, direction, _shape(case), most, *times, share, row["GB_per_s"])
                lines.append(_line(*cells, served.get((op, direction), "-"), row["device"]))
    return lines


def lost(rows: list[dict]) -> list[str]:
    found = report.verdicts(rows)
    body = [
        _line(line["op"], line["direction"], line["behind_eager"], line["worst_ratio"], line["worst_row"])
        for line in found
        if line["eager_calls"] == "reference"
    ]
    if body:
        head = _head("op", "direction", "rows behind", "worst ratio", "where")
        where = [
            "Our kernel is more than 5 % behind the reference or `torch.compile` of it in some row:",
            "",
            *head,
            *body,
        ]
    else:
        least = min((line for line in found if line["worst_ratio"]), key=lambda line: float(line["worst_ratio"]))
        row = f"{least['op']} {least['direction']}, {least['worst_row']}"
        where = [
            "In no row of eager calls is our kernel more than 5 % behind the better of the reference and "
            f"`torch.compile` of it. The lowest ratio is {least['worst_ratio']}: {row}."
        ]
    behind = [line for line in found if not line["behind_graph"].startswith("0/")]
    graphs = ", ".join(f"{line['op']} {line['direction']} {line['behind_graph']}" for line in behind)
    kernels = ", ".join(f"{line['op']} {line['direction']}" for line in found if line["in_graphs"] != "reference")
    return [
        "### Where we lose",
        "",
        *where,
        "",
        f"In compiled graphs the reference serves {f'but for {kernels}' if kernels else 'always'}; as an opaque op "
        f"there our kernel would lose in: {graphs or 'none'}.",
    ]


def measured_pipelines(races: list[dict], rates: dict) -> list[str]:
    lines = [
        "### Pipelines",
        "",
        "FLOP that ours computes, by formula and as counted while it ran; the limit is their time at the highest "
        "bfloat16 matrix rate measured on the device; parts are timed one by one, beside the whole. Bytes are not "
        "counted: activations are most of them, and the compiler decides which are moved. Of one image, forward: F "
        "classifier, E the condition's encoders, Q the posterior's, D decoder, G generator; B images, K samples, S "
        "steps of PGD; 2: with the gradient to the images, 3: to the weights too. "
        "[All contestants](../benchmarks/results/{folder}/pipelines.md).",
        "",
        *_head("pipeline", "FLOP", "GFLOP", "limit, ms", "plain", "compiled", "compiled, bfloat16", "ours",
               "of the limit", "its parts", "on"),
    ]  # fmt: skip
    known = {name: cases(False) for name, cases in pipelines.registry().items()}
    for pipeline, case in dict.fromkeys((row["pipeline"], row["case"]) for row in races):
        group = {row["contestant"]: row for row in races if (row["pipeline"], row["case"]) == (pipeline, case)}
        ours, first = group["ours"], next(iter(group.values()))
        made = known.get(pipeline, {}).get(case)
        best = 1e3 * float(ours["GFLOP"]) * 1e9 / rates[ours["device"]][1]
        compiled = [next((row for name, row in group.items() if name.startswith("torch.compile") and
                          name.endswith("bfloat16") == half), None) for half in (False, True)]  # fmt: skip
        times = [f"{float(row['ms']):,.1f}" if row and row["ms"] else "-" for row in (first, *compiled, ours)]
        share = f"{100 * best / float(ours['ms']):.0f} %" if ours["ms"] else "-"
        parts = ", ".join(f"{100 * part:.0f} % {name}" for name, part in report.parts(ours)) or "-"
        formula = f"`{made.flops}`" if made else ""
        cells = (f"{pipeline}: {case}; {ours['shape']}", formula, ours["GFLOP"], f"{best:,.1f}", *times)
        lines.append(_line(*cells, share, parts, ours["device"]))
    return lines


def launched(results: Path) -> list[str]:
    """Operators of one step of each training, from the committed count; empty where there is none."""
    if not (results / launches.FILE).exists():
        return []
    lines = [
        "## What a training step launches",
        "",
        "Operators dispatched by one step, forward and backward, without views: on a GPU each is a launch, and small "
        "batches wait for launches. Counted on the CPU with small networks; larger ones add their own layers to every "
        "column alike. By rule: a GPU on which nothing was raced, where a kernel serves eager calls if its "
        "forward and backward replace a dozen launches or more. All kernels: where each has won its race. What is "
        "left is the networks themselves. Captured: by rule, and each step of the attack is the replay of a CUDA "
        "graph, which counts as one launch; on a CPU the captured function runs again in its place.",
        "",
        *_head(
            "training",
            "references",
            "kernels by rule",
            "times fewer",
            "captured",
            "times fewer",
            "all kernels",
            "times fewer",
        ),
    ]
    for row in report.read_csv(results / launches.FILE):
        plain = int(row["references"])
        cells = [f"{plain:,}"]
        for name in ("by rule", "by rule, captured", "all kernels"):
            cells += [f"{int(row[name]):,}", f"{plain / int(row[name]):.1f}"]
        lines.append(_line(row["training"], *cells))
    return lines


def measured_races(raced: dict) -> list[str]:
    """What `purify-fast tune` found on a device: gains over the reference by op, and whom it lost to."""
    lines = [
        "### Races of kernel and reference",
        "",
        f"By `purify-fast tune` on {raced['machine']['device']}, {raced['date']}: how many times as fast as its "
        "reference in PyTorch each kernel is, geometric mean, least and most of all variants, layouts, dtypes and "
        "sizes. Who was ahead serves.",
        "",
        *_head("op", "eager calls", "replayed in a CUDA graph", "inside compiled graphs", "served by the reference"),
    ]
    for op, entry in raced["ops"].items():
        cells = []
        for style in ("eager", "replay", "graph"):
            ratios = sorted(row["reference_us"] / row["kernel_us"] for row in entry["rows"] if row["style"] == style)
            mean = statistics.geometric_mean(ratios) if ratios else 0.0
            cells.append(f"{mean:.1f} ({ratios[0]:.2g} to {ratios[-1]:,.2g})" if ratios else "-")
        lost = [name for name, who in entry["cells"].items() if who.get("eager") == "reference"]
        lines.append(_line(op, *cells, ", ".join(lost) or "-"))
    return lines


def chapter(folder: Path) -> list[str]:
    """The chapter of one folder of results; empty where nothing was measured."""
    rows, races = (
        report.read_csv(folder / name) if (folder / name).exists() else [] for name in (report.ROWS, report.PIPELINES)
    )
    rates, raced = _rates(folder, rows, races), shipping.read(folder)
    kind = "cpu" if folder.name == "cpu" else "cuda"
    parts = [measured_ops(kind, rows, rates), lost(rows)] if rows else []
    parts += [measured_races(raced)] if raced else []
    parts += [measured_pipelines(races, rates)] if races else []
    lines = [f"## Measured: {'CPU' if kind == 'cpu' else folder.name}"] if parts else []
    if parts and (folder / NOTES).exists():
        parts.append((folder / NOTES).read_text(encoding="utf-8").splitlines())
    for part in parts:
        lines += ["", *(line.replace("{folder}", folder.name) for line in part)]
    return lines


def page(results: Path) -> str:
    """The page's text from the folders of ``results``, each a device's."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        rows, races = (
            report.read_csv(folder / name) if (folder / name).exists() else []
            for name in (report.ROWS, report.PIPELINES)
        )
        if rows or races:
            found.append((folder, rows, races, _rates(folder, rows, races)))
    lines = [
        "# Performance",
        "",
        "What ops and pipelines must move and compute, how fast that could be, and how fast it is. Generated by "
        "`python -m benchmarks report` from `benchmarks/results`; a test holds that it is.",
        "",
        "## Limits of the devices",
        "",
        *_head("device", "copy, GB/s", "bfloat16 products, GFLOP/s", "measured"),
        _line("an H200-class GPU", *(f"{rate / 1e9:,.0f}" for rate in ASSUMED), "**assumed**, not measured"),
    ]
    for _, rows, races, rates in found:
        for device, (copied, multiplied) in rates.items():
            own = [row for row in (*rows, *races) if row["device"] == device]
            cells = (f"{rate / 1e9:,.0f}" if rate else "not measured" for rate in (copied, multiplied))
            lines.append(_line(device, *cells, _measured_on(own)))
    if all(folder.name == "cpu" for folder, *_ in found):
        lines += [
            "",
            "**Not yet run on a GPU.** What is said of one below is counted. `python -m benchmarks gpu_check` measures "
            "it; its folder in `benchmarks/results` becomes a chapter here. Until then a GPU kernel serves eager "
            "calls where forward and backward replace a dozen launches or more, once it was verified on the user's own "
            "card. Inside compiled graphs it does so only where compilers do not fuse the reference as well.",
        ]
    lines += ["", *counted(), *instructions.chapter(results)]
    if (results / launches.FILE).exists():
        lines += ["", *launched(results)]
    for counted_without_a_gpu in (captures.chapter(results), roofline.chapter(results)):
        lines += ["", *counted_without_a_gpu] if counted_without_a_gpu else []
    for folder, *_ in found:
        lines += ["", *chapter(folder)]
    return "\n".join(lines) + "\n"


def write(results: Path, docs: Path) -> Path:
    path = docs / PAGE
    write_text(path, page(results))
    return path
