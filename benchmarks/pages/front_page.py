"""Make the pictures of README, and sentences and tables about attacks and speed, from the committed results."""

from __future__ import annotations

import io
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purify_fast._files import write_text
from purify_fast.evaluation import Row

from ..kept import rows_of
from ..robustness import answer, contests
from ..robustness.broken import run_broken
from ..robustness.merged import FILE, read_rows
from ..robustness.truth import run_truth as truth
from ..speed import sheets
from ..speed.sheets import PIPELINES, ROWS, fastest, read_csv
from . import gpu_tables
from .methods_table import diffusion_draws, diffusion_rows

#: The colors of README's pictures. Green is this package or the best, gray is everything else, and red is unreliable.
INK, OURS, PLAIN, ALARM, GRID, PAPER = "#1b1f24", "#1f6f4a", "#9aa4ae", "#c62828", "#dde2e7", "#ffffff"
#: The same colors on a dark page.
DARK = {
    INK: "#e8eaed",
    OURS: "#5fbf8d",
    PLAIN: "#7d8791",
    ALARM: "#ff8a80",
    GRID: "#343a41",
    PAPER: "#0d1117",
}
#: The name of a report's row for the worst case over all attacks, image by image.
WORST = "worst"
#: The end of the names of the rows of CARSO without its randomness.
CALM = ", z = 0"
#: The study whose report the picture shows.
STUDY = "carso_mnist"
#: The folders of the devices in the table of speeds, and their names there.
CPU, GPU = "cpu", "nvidia-h200"
NAMES = {CPU: "one CPU core", GPU: "NVIDIA H200"}
#: The lines of the table of speeds: the folder, the title, and the names of a pipeline and a case in pipelines.csv.
CASES = [
    (CPU, "CARSO prediction, K = 8", "carso_inference", "prediction"),
    (CPU, "CARSO training step", "carso_training", "paper's objective"),
    (CPU, "CARSO training step, through the pipeline", "carso_training", "pipeline step"),
    (CPU, "AToP training step", "atop_finetune", "fine-tuning step"),
    (CPU, "ARREST training step", "arrest_step", "all attacked"),
    (CPU, "attack by PGD-10 on a ResNet-18, 32 images", "pgd_forms", "32 images"),
    (CPU, "purification by DDPM and prediction, K = 8", "diffusion", "prediction"),
    (GPU, "CARSO training step, through the pipeline", "carso_training", "pipeline step"),
    (GPU, "ARREST training step", "arrest_step", "all attacked"),
]
#: The number of images of the attack by PGD on a GPU in the table of speeds.
IMAGES = "256"
#: The titles of README's picture, by device. docs/speed.md has the others.
STEPS = "AToP training step", "CARSO training step, through the pipeline", "ARREST training step"
GPU_ATTACK = f"attack by PGD-10 on a ResNet-18, {IMAGES} images"
TOLD = {CPU: STEPS[:2], GPU: (*STEPS[1:], GPU_ATTACK)}


def _row(results: Path, model: str, attack: str) -> Row:
    rows = read_rows(results / "studies" / STUDY / FILE)
    (found,) = [row for row in rows if (row.model, row.attack) == (model, attack)]
    return found


@dataclass(frozen=True)
class Speed:
    """The fastest times of a computation on a device, in milliseconds.

    Attributes:
        device: name of the folder of the device.
        title: title of the computation.
        expert: time of the expert's faster form. None if it was not measured.
        own: time of the fastest form of this package.
        plain: time of plain PyTorch, in the default precision of the device.
        processor: name of the processor on which all of them ran.
    """

    device: str
    title: str
    expert: float | None
    own: float
    plain: float
    processor: str

    @property
    def gain(self) -> float | None:
        """The speedup over the expert."""
        return self.expert and self.expert / self.own


def speeds(results: Path) -> list[Speed]:
    """Return the speeds of the computations in `CASES`, and of the attack by PGD on a GPU.

    Args:
        results: folder of the committed results.
    """
    cases = []
    for device, title, pipeline, case in CASES:
        rows = [row for row in read_csv(results / device / PIPELINES) if device != CPU or row["threads"] == "1"]
        own = [row for row in rows if (row["pipeline"], row["case"]) == (pipeline, case) and row["ms"]]
        cases.append((device, title, own, "contestant"))
    attack = [row for row in gpu_tables.pgd_forms(results / GPU) if row.get("images", IMAGES) == IMAGES]
    cases.append((GPU, GPU_ATTACK, attack, "form"))
    found = []
    for device, title, rows, name in cases:
        # PyTorch's default for convolutions on a GPU is TF32, so the row in float32 is not plain PyTorch there.
        plain = fastest(rows, "plain, TF32", name) or fastest(rows, "plain", name)
        expert, own = fastest(rows, sheets.EXPERT, name), fastest(rows, sheets.OURS, name)
        if plain and own:
            found.append(Speed(device, title, expert, own, plain, processor_of(rows)))
    return found


def processor_of(rows: list[Any]) -> str:
    """Return the short name of the processor of rows, such as "one core of an Intel Xeon"."""
    (name,) = {re.sub(r"\(R\)|\(TM\)| Processor| x86_64.*", "", row["device"]) for row in rows}
    return name if name.startswith("NVIDIA") else f"one core of an {name}"


def _range(gains: list[float]) -> str:
    low, high = (f"{gain:.2f}" for gain in (min(gains), max(gains)))
    return low if low == high else f"{low} to {high}"


def told(results: Path) -> list[Speed]:
    """Return the speeds that README tells, in milliseconds: the time until the robust accuracy is known, and `TOLD`."""
    network, count = answer.NETWORKS[0], answer.COUNTS[0]
    rows = [row for row in answer.read(results / "studies") if row["network"] == network]
    sums = answer.sums_of(rows, count)
    every = [sums[who] for who in (answer.EXPERT, contests.OURS, contests.OFFICIAL)]
    machine = processor_of([row for row in rows if row["last"] <= count])
    expert, own, plain = (1e3 * row["cpu_seconds"] if row else None for row in every)
    shown = [one for one in speeds(results) if one.title in TOLD[one.device]]
    if own is None or plain is None:
        return shown
    return [
        Speed(CPU, f"robust accuracy of {network.partition(',')[0]}, {count} images", expert, own, plain, machine),
        *shown,
    ]


def claim(results: Path) -> list[str]:
    """Return sentences about speed: compared with an expert's code on each device, and for single operations.

    Args:
        results: folder of the committed results.
    """
    sentences = []
    for device, name in NAMES.items():
        gains = [one.gain for one in speeds(results) if one.device == device and one.gain is not None]
        if gains:
            sentences.append(f"{_range(gains)} times as fast as an expert's code in PyTorch alone ({name})")
    sentences[-1] += ", each of them in its faster form, compiled or not"
    ops = [row for row in read_csv(results / CPU / ROWS) if row["style"] == "eager" and row["ratio"]]
    gains = ([float(row[kind]) / float(row["ours_us"]) for row in ops] for kind in ("compile_us", "eager_us"))
    compiled, eager = map(statistics.geometric_mean, gains)
    return [
        f"In our measurements, purify_fast was {', and '.join(sentences)}. On one or two cores of an AMD EPYC or an "
        f"Intel Xeon, single operations were {compiled:.1f} times as fast as under `torch.compile`, and {eager:.1f} "
        f"times as fast as without it (geometric means of {len(ops)} measurements)."
    ]


def contests_sentence(results: Path) -> list[str]:
    """Return the line in the table of attacks that compares the default protocol with AutoAttack.

    Args:
        results: folder of the committed results.
    """
    # The second file is that of a finished study.
    rows = [row for file in (contests.FILE, "evaluation.json") for row in rows_of(results / "studies" / file)]
    official = {row["contest"]: row for row in rows if row["contestant"] == contests.OFFICIAL}
    leads: dict[str, list[float]] = {}
    for row in rows:
        theirs = official.get(row["contest"])
        ours = row["contestant"].partition(",")[0] == contests.OURS
        # Compare only runs on equally many images, because an unfinished run of AutoAttack has fewer images.
        if ours and theirs is not None and len(theirs.get("left", "")) == len(row.get("left", "")):
            leads.setdefault(row["contest"], []).append(theirs["robust"] - row["robust"])
    every = [lead for of_contest in leads.values() for lead in of_contest]
    above, equal = (sum(lead < 0 for lead in every), sum(lead == 0 for lead in every))
    higher = f"higher in {above}, by at most {-min(every):.1f} points" if above else "never higher"
    return [
        f"| {len(leads)} models that the official AutoAttack attacked too | "
        f"The robust accuracy under `standard` is up to {max(every):.1f} points lower than under AutoAttack. "
        f"In {len(every)} runs it is equal in {equal}, and {higher}. |"
    ]


def judges_sentences(results: Path) -> list[str]:
    """Return the table of attacks: the protocols, compared with AutoAttack, adaptive attacks and exact answers.

    Args:
        results: folder of the committed results.
    """
    lines = [*contests_sentence(results), *broken_sentence(results), *truth.front(results)]
    return ["| attacked | result |", "| --- | --- |", *lines, *diffusion_sentence(results)]


def diffusion_sentence(results: Path) -> list[str]:
    """Return the line about DiffPure in the table of attacks.

    Args:
        results: folder of the committed results.
    """
    name = "digits-diffpure"
    exact, authors = (diffusion_rows(results, group)[name] for group in ("exact", "authors"))
    most = max(([int(bit) for bit in attack["robust"]] for attack in authors["rows"]), key=statistics.fmean)
    # AutoAttack was too slow for more than the first images.
    count, draws = len(most), diffusion_draws(exact, "attacked")[:, : len(most)]
    return [
        f"| `{name}`, a [purifier by diffusion](diffusion.md) with random predictions | AutoAttack, run as "
        f"by the method's authors, leaves {100 * sum(most) / count:.0f} % of {count} images correct in one prediction "
        f"each. On the same images, PGD with exact gradients leaves {100 * draws.mean():.1f} % of predictions "
        f"correct, and {100 * draws.all(0).mean():.0f} % of images correct in all ten predictions. |"
    ]


def broken_sentence(results: Path) -> list[str]:
    """Return the line about broken defences in the table of attacks.

    Args:
        results: folder of the committed results.
    """
    rows = rows_of(results / run_broken.FILE)
    names = [name for name, entry in run_broken.ENTRIES.items() if entry.paper]
    said = [run_broken.verdicts({row["judge"]: row for row in rows if row["model"] == name}) for name in names]
    both = [each for each in said if "-" not in (each[run_broken.OFFICIAL], each[run_broken.STANDARD])]
    official, default = ([each[judge] for each in both] for judge in (run_broken.OFFICIAL, run_broken.STANDARD))
    flagged, above = default.count("flagged"), default.count("flagged") + default.count("missed")
    return [
        "| rebuilt defences that [adaptive attacks](judge_reference.md#defences-that-were-broken) have broken | "
        f"AutoAttack and `standard` both judged {len(both)} defences, on 40 to 100 images each. Compared with the "
        f"adaptive attack, AutoAttack overestimates {official.count('missed')} by more than 2 points. `standard` "
        f"overestimates {above}, and marks its results for {'these' if flagged == above else f'{flagged} of these'} as "
        "unreliable. |"
    ]


def pictures(results: Path, folder: Path) -> None:
    """Draw README's pictures, ``claim.svg`` and ``speed.svg``, which are dark where the reader's pages are.

    Nothing is drawn if matplotlib is not installed. The same results always give the same bytes.

    Args:
        results: folder of the committed results.
        folder: folder of the SVG files.
    """
    try:
        # Do not use pyplot, because pyplot would change matplotlib's backend and the figures that the user has opened.
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return
    for name, draw, height in (("claim.svg", draw_claim, 3.6), ("speed.svg", draw_speed, 3.8)):
        figure = Figure(facecolor=PAPER, layout="constrained", figsize=(9, height))
        axes = figure.add_subplot(facecolor=PAPER)
        # Add light vertical grid lines, and remove the frame except its lower edge.
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(PLAIN)
        axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        draw(results, axes)
        file = io.StringIO()
        with rc_context({"svg.hashsalt": name}):
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        write_text(folder / name, in_both_schemes(file.getvalue()))


def in_both_schemes(drawing: str) -> str:
    """Let a drawing in the colors of `DARK` have those of a dark page where the reader prefers it."""
    names = {color: f"--c{number}" for number, color in enumerate(DARK)}
    for color, name in names.items():
        drawing = drawing.replace(color, f"var({name})")
    light, dark = ("; ".join(f"{names[color]}: {shown(color)}" for color in DARK) for shown in (str, DARK.get))
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, defs, rest = drawing.partition("<defs>")
    return f"{head}{style}\n {defs}{rest}"


def draw_speed(results: Path, axes: Any) -> None:
    """Draw the times that README tells, each relative to that of plain PyTorch."""
    shown = told(results)
    for at, one in enumerate(shown):
        forms = (("expert", one.expert, PLAIN), ("purify_fast", one.own, OURS))
        for offset, (form, ms, color) in zip((-0.19, 0.19), forms, strict=True):
            text = "not measured" if ms is None else f"{100 * ms / one.plain:.0f} %"
            bar = axes.barh(at + offset, 0 if ms is None else 100 * ms / one.plain, height=0.36, color=color)
            axes.bar_label(bar, [f"{form}: {text}"], padding=4, fontsize=8, color=INK)
    axes.axvline(100, color=ALARM, linewidth=1)
    axes.text(101, -0.55, "plain PyTorch", fontsize=8, color=ALARM, va="top")
    axes.set_yticks(range(len(shown)), [f"{one.title}\n{one.processor}" for one in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 125)
    axes.set_title(
        "Time of a computation, relative to plain PyTorch", fontsize=9.5, loc="left", color=INK, weight="bold"
    )
    axes.set_xlabel("% of the time of plain PyTorch; shorter is better", fontsize=9.5, color=INK)


def draw_claim(results: Path, axes: Any) -> None:
    """Draw CARSO's accuracy under attacks through its own output, and under exact gradients."""
    masked = "CARSO, paper's objective,\nattacked through its output PeeL"
    bars = [
        (masked, f"CARSO, paper's objective, through PeeL{CALM}"),
        ("the same CARSO,\nattacked with exact gradients", f"CARSO, paper's objective{CALM}"),
        ("the classifier alone,\ntrained adversarially", "classifier"),
        ("CARSO trained by purify_fast\nthrough the whole defence", f"CARSO pipeline{CALM}"),
    ]
    titles, models = zip(*bars, strict=True)
    rows = [_row(results, model, WORST) for model in models]
    numbers = (f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %" for row in rows)
    doubts = ("" if row.reliable else "\nunreliable: no gradients" for row in rows)
    texts = [number + doubt for number, doubt in zip(numbers, doubts, strict=True)]
    # The best is green: a reader takes green for the best, whoever made it.
    best = max(row.accuracy for row in rows if row.reliable)
    colors = [OURS if row.accuracy == best else PLAIN for row in rows]
    widths = [100 * row.accuracy for row in rows]
    container = axes.barh(range(len(titles)), widths, height=0.72, color=colors)
    card = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
    axes.bar_label(container, texts, padding=4, fontsize=8.5, color=INK, bbox=card)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.set_xlim(0, 125)
    for bar, row in zip(container, rows, strict=True):
        if not row.reliable:
            bar.set(facecolor=PAPER, edgecolor=ALARM, hatch="////")
    title = "CARSO, as we trained it, under attacks along two kinds of gradients"
    axes.set_title(title, fontsize=9.5, loc="left", color=INK, weight="bold")
    axes.set_xticks(range(0, 101, 20))
    what = "images still classified correctly under attack, %  (MNIST, 1,000 images, L-inf 0.3)"
    axes.set_xlabel(what, fontsize=9.5, color=INK)
