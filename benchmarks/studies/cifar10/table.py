"""The tables and pictures of the study on CIFAR-10, of all that is judged so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purify_fast._files import write_text
from purify_fast.evaluation import Tradeoff, plot_tradeoff
from purify_fast.evaluation.show.tables import markdown_table

from ... import style
from .. import Unfit
from . import study
from .results import GIVEN, STEM, Results, collect
from .study import Budget, Judging


class NothingJudged(Unfit):
    """A table was asked for, and there is no row for it yet."""


def table(results: Results, names: Sequence[str], budget: Budget, seed: int = 0) -> list[str]:
    """One line for each model: accuracies, trade-offs, costs.

    Args:
        results: of the study.
        names: of rows whose models are judged.
        budget: how much of everything there is.
        seed: of the trainings.
    """
    counts = budget.judging
    protocols = {
        protocol: count
        for protocol, count in counts.protocols().items()
        if any(protocol in results.lines[name, seed] for name in names)
    }
    body = []
    for name in names:
        line = results.lines[name, seed]
        both = Tradeoff(100 * line["clean"], 100 * line[counts.main])
        body.append(
            [
                name if name == line["model"] else f"{name}: {line['model']}",
                _percent(line["clean"], counts.clean),
                *(_attacked(line, protocol, count) for protocol, count in protocols.items()),
                f"{both.sum:.1f}",
                f"{both.nrr:.1f}",
                f"{line['parameters'] / 1e6:.2f}",
                f"{line['inference_gflop']:.3f}",
                f"{line['training_gflop']:.2f}",
                f"{line['hours']:.2f}" if line["hours"] else "-",
            ]
        )
    head = ["model", "clean", *(f"`{name}` ({count:,})" for name, count in protocols.items()), "SUM", "NRR"]
    costs = ["million parameters", "GFLOP a prediction", "GFLOP a training image", "hours of training"]
    return markdown_table([*head, *costs], body)


def _error(share: float, images: int) -> float:
    """The binomial standard error of a share, in percent points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def _percent(share: float, images: int) -> str:
    """A share in percent, with its standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


def _attacked(line: dict[str, Any], protocol: str, images: int) -> str:
    """The cell of a protocol."""
    if protocol not in line:
        return "-"
    return _marked(_percent(line[protocol], images), protocol not in line.get("unreliable", ()))


def _marked(text: str, reliable: bool) -> str:
    """A number, and whether it can be believed."""
    return text if reliable else f"{text} **unreliable**"


def candidates_table(results: Results, counts: Judging) -> list[str]:
    """The candidates on held-out training images."""
    body = [
        [name, source, _percent(line["clean"], counts.held_out), _attacked(line, "tried", counts.candidates)]
        for name, source in study.TRIED.items()
        if (line := results.line(study.tried_name(name))) is not None
    ]
    return markdown_table(["candidate", "what it is", "clean", f"`{counts.tried}`"], body) if body else []


def authors_table(results: Results, counts: Judging) -> list[str]:
    """Models under the attacks of their authors, beside what compares models, on the same images.

    Args:
        results: of the study.
        counts: how many images each protocol has.
    """
    body = [
        [
            name,
            _marked(f"{100 * line['authors']:.1f}", line["reliable"]),
            f"{100 * line['whole']:.1f}",
            f"{100 * line['classifier']:.1f}",
            f"{100 * line['gained']:+.1f} ± {100 * line['gained_error']:.1f}",
        ]
        for name in study.AS_AUTHORS
        if (line := results.line(name)) is not None
    ]
    head = ["model", "the attack of its authors", f"`{counts.main}`", f"its classifier alone, `{counts.main}`"]
    return markdown_table([*head, "second minus first"], body) if body else []


def authors_caption(budget: Budget) -> str:
    """What stands above `authors_table`."""
    return (
        "With noise, through PeeL, or on the classifier alone as AToP's notebooks do while they train (code: "
        f"cifar-miss-gau-adv.ipynb:130-133): PGD-{budget.training.carso_steps} with two losses, five draws a step, "
        f"on the first {budget.judging.authors:,} test images. An image counts if each of five predictions is right. "
        "The other columns are without noise, on the same images:"
    )


def differences(
    results: Results,
    counts: Judging,
    seed: int = 0,
    pairs: Sequence[tuple[str, str]] = study.PAIRS,
    shared: Sequence[str] = (),
) -> list[str]:
    """A line for each pair of which both models are judged: the difference, image by image.

    Args:
        results: of the study.
        counts: how many images each protocol has.
        seed: of the trainings.
        pairs: names of rows.
        shared: rows of the first seed that models of all seeds stand on.
    """
    reports = {
        name: report for (name, of), report in results.reports.items() if of == seed or (of == 0 and name in shared)
    }
    return [
        f"- {name} minus {other}, `{counts.main}`: {reports[name].paired(reports[other])}."
        for name, other in pairs
        if name in reports and other in reports
    ]


def strong_beside_main(results: Results, names: Sequence[str], counts: Judging) -> str:
    """In which rows ``strong`` leaves another number of the images that what compares models attacked too; "" if none.

    Args:
        results: of the study.
        names: of rows whose models are judged.
        counts: how many images each protocol has.
    """
    lines = {name: results.lines[name, 0] for name in names}
    more = {name: line["strong_more"] for name, line in lines.items() if "strong_more" in line}
    if not more:
        return ""
    others = [f"{name} {change:+d}" for name, change in more.items() if change]
    text = f"On the same {counts.strong:,} images `strong` leaves as many right as `{counts.main}` in "
    text += f"{len(more) - len(others)} of {len(more)} rows"
    return text + (f"; the others: {'; '.join(others)}." if others else ".")


def official_table(results: Results, counts: Judging) -> list[str]:
    """The official AutoAttack beside this package's protocols, on the same images."""
    protocols = [name for name, count in counts.protocols().items() if count >= counts.official]
    body = []
    for name in study.OFFICIAL:
        line = results.line(name) or {}
        beside = line.get("beside_official", {})
        if all(protocol in beside for protocol in protocols) and "official" in line:
            shares = [*(beside[protocol] for protocol in protocols), line["official"]]
            body.append([name, str(counts.official), *(f"{100 * share:.1f}" for share in shares)])
    head = ["model", "images", *(f"`{name}`" for name in protocols), "the official AutoAttack"]
    return markdown_table(head, body) if body else []


def settings(results: Results, budget: Budget, elsewhere: Sequence[str] = ()) -> str:
    """What was trained and judged, and how much of it.

    Args:
        results: of the study.
        budget: how much of everything there is.
        elsewhere: rows that stand in the table of a base that was given.
    """
    amount, counts = budget.training, budget.judging
    text = (
        f"CIFAR-10, L-inf 8/255. A PreActResNet-18 of width {amount.width}. Clean accuracy is on {counts.clean:,} test "
        "images; each protocol attacks as many of the first ones as its column says; all in percent, with binomial "
        "standard errors. CARSO and AToP predict without noise (CARSO from the most likely latent). Models are trained "
        f"on the first {amount.train_images:,} training images, for {amount.standard_epochs} epochs on clean images, "
        f"{amount.base_epochs} of PGD-{amount.steps} for each base ({amount.large_epochs} for the larger one; the "
        f"longer one is the base after {amount.long_epochs - amount.base_epochs} more), "
        f"{amount.arrest_epochs} of PGD-{amount.steps} for ARREST and AFT, "
        f"{amount.objective_epochs} of CARSO with the paper's objective, "
        f"and {amount.pipeline_epochs} of AToP with the paper's objective and of all that is trained through the "
        "pipeline; ARREST, AFT and the bases keep a moving average of their weights; with seed 0 where nothing else is "
        "said. Hours of training are as they passed, with other jobs beside, on one to four threads: GFLOP compare "
        "costs. Both are of a row's last stage."
    )
    if (line := results.line(study.ARREST_EMA)) is not None:
        pair = f"lambda {line['weight']:g} and phi {line['angle']:g}"
        text += f" On training images that the search left out {pair} were chosen for ARREST."
    return "\n\n".join([text, *not_judged(results, budget, elsewhere)])


def not_judged(results: Results, budget: Budget, elsewhere: Sequence[str]) -> list[str]:
    """A sentence for each part of the study that has not ended; none when all is done.

    Args:
        results: of the study.
        budget: how much of everything there is.
        elsewhere: rows that stand in the table of a base that was given, and are not missed here.
    """
    counts = budget.judging
    wanted = [name for name in (*study.rows(budget), study.BEST) if name not in elsewhere]
    official = [name for name in study.OFFICIAL if counts.official > 0 and "official" not in (results.line(name) or {})]
    judged = results.judged(wanted)
    strong = [name for name in judged if counts.strong > 0 and "strong" not in results.lines[name, 0]]
    missing = {
        "Not judged yet": [name for name in wanted if name not in judged],
        "Not attacked by `strong` yet": strong,
        "Candidates that are not judged yet": [
            name for name in study.TRIED if results.line(study.tried_name(name)) is None
        ],
        "Not attacked by the official AutoAttack yet": official,
    }
    for seed in range(1, budget.seeds):
        there = results.judged(study.COMPARED, seed)
        missing[f"With seed {seed} not judged yet"] = [
            name for name in study.COMPARED if name not in there and name not in elsewhere
        ]
    return [f"{what}: {'; '.join(names)}." for what, names in missing.items() if names]


def reached_by(line: dict[str, Any], counts: Judging) -> Point:
    """Where a model stands in the pictures.

    Args:
        line: of the model.
        counts: how many images each protocol has.
    """
    clean, robust = line["clean"], line[counts.main]
    return 100 * clean, 100 * robust, _error(clean, counts.clean), _error(robust, counts.protocols()[counts.main])


def write_given(root: Path, folder: Path, base: str, budget: Budget | None = None) -> Path:
    """``cifar10_given.md`` and its numbers and reports in ``folder``, of every row of `ON_GIVEN` that is judged.

    Args:
        root: of the study on the base that was given.
        folder: of the results.
        base: its name in the zoo.
        budget: how much of everything there is; the default one by default.

    Raises:
        NothingJudged: ``root`` holds nothing that is judged.
        OtherBudget: ``root`` or ``folder`` is of another budget.
    """
    budget = budget or Budget()
    counts, amount = budget.judging, budget.training
    results = collect(root, budget, study.ON_GIVEN).over(Results.read(folder, budget, GIVEN))
    if not results.lines:
        raise NothingJudged(f"{root} holds no model that is judged: the study writes its table when the first one is")
    results.save(folder, budget, GIVEN)
    lines = [
        f"CIFAR-10, L-inf 8/255. PGD-AT is `{base}` of the zoo, trained with seed 1; the standard classifier was "
        f"trained anew with seed 0, for {amount.standard_epochs} epochs. All purifiers stand on these two, whatever "
        f"their own seed. AToP has the paper's objective for {amount.pipeline_epochs} epochs in batches of "
        f"{amount.batch_size}, and its cross-entropy acts after {amount.atop_delay_images:,} images. The rest is as in "
        "the first table."
    ]
    if results.judged([study.ARREST, study.ARREST_EMA]):
        lines[0] += (
            f" ARREST has {amount.arrest_epochs} epochs of PGD-{amount.steps}, lambda {study.CHOSEN[0]:g} and phi "
            f"{study.CHOSEN[1]:g}; both of its rows are one training, with the moving average of the weights and "
            "without it."
        )
    for seed in range(budget.seeds):
        if judged := results.judged(study.ON_GIVEN, seed):
            lines += ["", f"Seed {seed}:", "", *table(results, judged, budget, seed)]
            if between := differences(results, counts, seed, study.GIVEN_PAIRS, shared=(study.BASE, study.STANDARD)):
                lines += ["", *between]
    acts = [
        f"{name}, seed {seed}: {', '.join(f'{term} from step {step}' for term, step in line['acts_from_step'].items())}"
        for (name, seed), line in sorted(results.lines.items(), key=lambda item: item[0][1])
        if "acts_from_step" in line
    ]
    if acts:
        lines += ["", f"The terms of the loss that acted, by the logs of the trainings. {'; '.join(acts)}."]
    if authors := authors_table(results, counts):
        lines += ["", authors_caption(budget), "", *authors]
    write_text(folder / f"{GIVEN}.md", "\n".join(lines) + "\n")
    return folder / f"{GIVEN}.md"


def write(root: Path, folder: Path, budget: Budget | None = None) -> Path:
    """``cifar10.md`` and its numbers, reports and pictures in ``folder``, of every model that is judged.

    What ``folder`` holds already, of the same budget, stays where ``root`` has nothing in its place: a study can be
    done in parts, on several machines.

    Args:
        root: of the study.
        folder: of the results.
        budget: how much of everything there is; the default one by default.

    Raises:
        NothingJudged: ``root`` holds nothing that is judged, or there is no row of the first seed.
        OtherBudget: ``root`` or ``folder`` is of another budget.
    """
    budget = budget or Budget()
    counts, wanted = budget.judging, [*study.rows(budget), study.BEST]
    new = collect(root, budget)
    results = new.over(Results.read(folder, budget))
    names = results.judged(wanted)
    if not new.lines or not names:
        raise NothingJudged(f"{root} holds no model that is judged: the study writes its table when the first one is")
    results.save(folder, budget)
    given = {name for name, _ in Results.read(folder, budget, GIVEN).lines}
    lines = [settings(results, budget, sorted(given)), "", *table(results, names, budget), ""]
    lines += differences(results, counts)
    if beside := strong_beside_main(results, names, counts):
        lines += ["", beside]
    for seed in range(1, budget.seeds):
        if judged := results.judged(study.COMPARED, seed):
            lines += ["", f"Trained with seed {seed}:", "", *table(results, judged, budget, seed)]
            if between := differences(results, counts, seed):
                lines += ["", *between]
    if tried := candidates_table(results, counts):
        where = f"{counts.candidates:,} training images that no model was trained on"
        lines += ["", f"Candidates, judged on {where} (clean accuracy on {counts.held_out:,}):", "", *tried]
    if authors := authors_table(results, counts):
        lines += ["", authors_caption(budget), "", *authors]
    if official := official_table(results, counts):
        lines += ["", "The official AutoAttack on the same images:", "", *official]
    reached = {name: reached_by(results.lines[name, 0], counts) for name in names}
    plot(reached, budget, folder / STEM / "tradeoff.png")
    picture(reached, folder / STEM / "photos.png")
    write_text(folder / "cifar10.md", "\n".join(lines) + "\n")
    return folder / "cifar10.md"


#: Clean and robust accuracy in percent, and the standard error of each.
Point = tuple[float, float, float, float]


def plot(points: dict[str, Point], budget: Budget, path: Path) -> None:
    """Clean against robust accuracy, with the curve of bases that were trained at shares of eps.

    Args:
        points: of the models, by row.
        budget: how much of everything there is.
        path: of the picture.
    """
    names = [study.STANDARD, *(study.share_name(share) for share in budget.shares), study.BASE]
    curve: dict[float, float] = {}
    for clean, robust in (points[name][:2] for name in names if name in points):
        # a curve has one value at each place: the higher one counts
        curve[clean] = max(robust, curve.get(clean, 0.0))
    line = sorted(curve.items()) if len(curve) > 1 else None
    # the first is a stage of others, the second stands where the base does
    shown = {name: value for name, value in points.items() if name not in (study.GENERATOR, study.NO_EMA)}
    plot_tradeoff(path, shown, line, reference_name="trained at shares of eps", title="CIFAR-10, L-inf 8/255")


#: Bars of the picture for those who do not read tables: what each is, and its row.
BARS = (
    ("A: a network trained on clean photos", study.STANDARD),
    ("B: the same, trained on attacked photos", study.BASE),
    ("ARREST, from A", study.ARREST_EMA),
    ("CARSO before B, paper's objective", study.CARSO),
    ("CARSO before B, trained through the pipeline", study.CARSO_PIPELINE),
    ("AToP before B, trained through the pipeline", study.ATOP_PIPELINE),
)


def picture(points: dict[str, Point], path: Path) -> bool:
    """How many of a hundred photos each model still recognizes; False without matplotlib.

    Args:
        points: of the models, by row.
        path: of the picture.
    """
    bars = [(title, name) for title, name in BARS if name in points]
    figure = style.new_figure(figsize=(9, 1 + 0.52 * len(bars)))
    if figure is None:
        return False
    axis = figure.add_subplot()
    for line, (title, name) in enumerate(bars):
        clean, robust = points[name][:2]
        axis.barh(line, clean, height=0.62, color="#e3e6ea")
        axis.barh(line, robust, height=0.62, color=style.OURS)
        axis.text(101, line, f"{robust:.0f} of {clean:.0f}", va="center", color=style.INK)
        axis.text(-1, line, title, va="center", ha="right", color=style.INK, fontsize=9.5)
    if study.BASE in points:
        # what every defence has to beat
        axis.axvline(points[study.BASE][1], color=style.INK, linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set(xlim=(0, 100), yticks=[], xticks=range(0, 101, 20))
    text = "of 100 photos (CIFAR-10, L-inf 8/255): gray, recognized; green, still recognized when attacked"
    axis.set_xlabel(text, fontsize=9.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    style.save(figure, path)
    return True
