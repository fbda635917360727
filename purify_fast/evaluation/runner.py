"""The evaluation: every attack on every image the model classifies, judged by fresh predictions, with gradient health.

A row is one attack. The model is attacked and judged in one of three variants: ``random``, as it is; ``fixed``, under
``model.fixed_noise(seed)``; ``deterministic``, under ``model.deterministic()``. Any callable can be evaluated; those
context managers, and ``sample_logits``, are used if the model has them, and checked before. The images of an attack on
a variant are tried on the model as it is, which alone has the headline.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._tensors import digest, text_hash
from .._validation import NormName, check_folder, read_norm
from .._version import __version__
from ..attacks import Attack, AttackContext, AutoAttack, frozen
from ..attacks.arguments import check_eps
from ..attacks.attacked_model import check_leaves_images
from ..attacks.base import ThreatModel
from ..attacks.engine.gradient_copy import GradientCopies
from ..attacks.original_autoattack import implementation
from ..ops import keep_kernels, kernels_now
from ..protocols import Classifier
from ..speed.graphs.step_graphs import StepGraphs
from ..speed.precision import raced_convolutions, whole_float32_by_default
from .alarms import Evidence, Probes, findings, outlook, probe, signs_of_masking
from .alarms.answers import PROBED, Before
from .alarms.probes import AskedBefore, asked_before
from .alarms.probes import cost as cost_of_probes
from .alarms.probes import parts as parts_of_probes
from .attack_lists import SEARCHES, notes_of_protocol, protocol_attacks, to_the_end
from .cache import RowCache
from .config import EvaluateConfig, ProtocolName
from .curve import Curve, attacks_of_curve, radii_of
from .fingerprint import fingerprint, fingerprint_or_reason
from .fitting import images_together, make_room
from .inputs import INSTEAD_OF_PROBABILITIES, ONE_HOT, as_classifier, in_chunks
from .measure import EXAMPLES, Measure
from .naming import ball_name, beside_fixed, feasible, row_name, threat_name, unusual_radius
from .progress import Progress, counted_model
from .repeating import processor_name, written_call
from .report import Report
from .rows import Row, count_fallen, joined, worst_rows
from .specs import AttackFunction, AttackSpec, as_specs
from .stopping import notes_of_proofs, notes_of_unsearched
from .subject import Subject, Variant, device_of, notes_of_modules, precision_name, refresh_stale_copies
from .team import PROBES, SIGNS, Task, Team
from .witnesses import gathered, model_marks

logger = logging.getLogger("purify_fast")

#: The largest share of images, among those that an attack takes for fallen, that may be right in all judging draws.
SURELY = 0.01

F = TypeVar("F", bound=Callable[..., Any])
#: Number of a data loader's batches that go through all attacks together. With fewer, attacks on the remaining images
#: would have small batches.
CHUNK = 4


def called_by_people(function: F) -> F:
    """A decorator of `evaluate`, which refuses ``device`` and settings that are not in the config.

    A KeyboardInterrupt is raised again from here, with a message. After Ctrl-C the frames of the attack are of no use;
    a debugger has them in ``__context__``. Subclasses of KeyboardInterrupt, and an interrupt with a message, pass
    unchanged.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            raise TypeError(
                f"evaluate takes no device, got device={kwargs['device']!r}: it computes on the model's own device. "
                "Move the model first, as in model.to('cuda'); the images follow it"
            )
        if settings := [each.name for each in fields(EvaluateConfig) if each.name in kwargs]:
            words = ", ".join(f"{name}={kwargs[name]!r}" for name in settings)
            raise TypeError(f"{settings[0]} is a setting: give evaluate(..., config=EvaluateConfig({words}))")
        try:
            report = function(*args, **kwargs)
            report.about["call"] = written_call(function, args, kwargs)
            return report
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt or error.args:
                raise
            advice = ", and nothing is kept: with out=FOLDER, calling it again would go on from there"
            if (out := kwargs.get("out")) is not None:
                advice = f"; what it has finished and can keep is in {out}: call it again to go on from there"
            raise KeyboardInterrupt(f"evaluate was interrupted{advice}") from None

    return wrapper  # type: ignore[return-value]


@called_by_people
@whole_float32_by_default()
@torch.inference_mode(False)
def evaluate(
    model: Classifier,
    x: Tensor | Iterable[Any],
    y: Tensor | None = None,
    *,
    eps: float,
    config: EvaluateConfig = EvaluateConfig(),
    norm: NormName = "linf",
    base: Classifier | None = None,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None = None,
    out: str | Path | None = None,
    name: str = "defence",
    revision: str | None = None,
    progress: bool = True,
) -> Report:
    """Run all requested attacks on a model, and report what it withstands.

    Args:
        model: images ``[B, C, H, W]`` float32 in [0, 1] to logits ``[B, classes]``; any callable that does not write to
            the images. Afterwards a module's mode, ``requires_grad`` flags and weights, and the random generators, are
            as before; so are those of modules that it holds in plain lists, objects or hooks. A function is called as
            it is: put the modules that it uses into evaluation mode yourself. A warning and the report's notes name
            modules in training mode that it is seen to use.
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array; they are converted to
            float32. Or, without ``y``, a DataLoader or any other iterable of batches (images, labels) or (images,
            labels, indices), which is read once, in parts of four batches of ``batch_size`` images, or of 64 images: a
            part goes through all attacks before the next part is read. The first part is kept to the end, for the
            signs, and each other part until the next is read. Batches are checked when they are read.
        y: labels, integers ``[N]``, a tensor or a NumPy array.
        eps: radius of the ball, in image units; above 0 if anything is attacked.
        config: the settings, such as the protocol, the steps and the seed.
        norm: norm of the ball: ``linf``, ``l2`` or ``l1``.
        base: an undefended classifier, whose adversarial images are tried on the defence.
        attacks: attacks in place of a protocol: attacks of `purify_fast.attacks`, such as ``PGD()``; attacks of
            torchattacks, Foolbox or ART; functions ``(model, x, y) -> x_adv``, which `as_attack` describes; or
            `AttackSpec` around any of them. An empty list: the accuracy on clean images alone. Variants that the
            defence lacks, or that are not what they promise (noise that `fixed_noise` does not fix), are left out, with
            a note.
        out: a folder; each finished row is kept in ``out/rows`` and used again if settings, weights, data and the code
            of the model's classes agree. Rows of models without weights to compare (plain callables), or holding values
            that cannot be compared, are made anew, with a warning.
        name: name of the model in the report.
        revision: the user's name for what the model computes: with it, the rows of every model are kept. Change it when
            code changes that the model's classes import from other files, or the code of a function.
        progress: whether to show a bar for each attack: forward passes of single images.

    Returns:
        A `Report`: a clean row per variant, a row per attack, and rows named ``worst``. An image is robust there only
        if it is robust in every row of the deployed model, AutoAttack and transferred images included; a row that
        attacked only survivors includes earlier falls.
        The images of an attack on a variant are tried on the deployed model, in a second row, which enters ``worst``;
        the first row enters only "worst, fixed" or "worst, deterministic". Attacks on the first 200 images enter
        "worst, first 200" instead, with all other attacks on these. Another threat model with several attacks has its
        own ``worst``.

    Raises:
        ValueError: a wrong shape, dtype, range or setting, a model that writes to its input, a way to predict for a
            deterministic model, ``out`` is a file, or the processes evaluate different things.
        ConnectionError: the first process of several does not answer.
        KeyboardInterrupt: Ctrl-C, with a message that says how to go on and without the frames of the attack.
        TypeError: images or labels are neither tensors nor arrays, eps is not a number, an attack is not an attack, or
            a ``device`` is given.
        ModuleNotFoundError: AutoAttack is asked for and missing.
    """
    check_folder("out", out)
    norm = read_norm(norm)
    check_eps(eps, norm)
    in_batch = images_together(config.batch_size, config.memory)
    chunks = in_chunks(x, y, max(CHUNK * in_batch, PROBED))
    images, labels, more = next(chunks)
    protocol, given = _protocol_or_attacks(config.protocol, attacks)
    _check_moves(eps, bool(given or protocol or config.probes))
    radii = radii_of(config.curve, eps, 1.0 if norm == "linf" else math.inf)
    device = device_of(model, images)
    report = Report(about=_about(replace(config, protocol=protocol), norm, eps, model, device))
    model = as_classifier(model)
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(Team(config.together))
        stack.enter_context(torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(raced_convolutions(config.cudnn_benchmark, device))
        stack.enter_context(frozen(model))
        refresh_stale_copies(model, base, *(spec.other_model for spec in given))
        judging: dict[str, Any] = {each: getattr(config, each) for each in ("n_eval", "predict", "seed")}
        subject = Subject(model, images, labels, batch_size=in_batch, **judging)
        subject.more = more
        if config.batch_size == "auto":
            make_room(subject, [subject.model], config.memory, RowCache(None))
        # Take it after the trial predictions: a model that stores its last input is then always in the same state.
        mark = fingerprint_or_reason(subject.model, revision)
        report.about |= {} if mark[0] is None else {"model": mark[0]}
        report.notes += _how_judged(config) + _first_notes(model, subject, name, protocol)
        signs = config.has_signs(attacks)
        before = subject.room.within(lambda: Before(subject)) if signs else None
        ball = ThreatModel(norm, float(eps))
        plan = given if protocol is None else protocol_attacks(protocol, subject, ball, base, config.steps)
        if config.predict is not None:
            plan = beside_fixed(plan, subject)
        others = _freeze_others([base, *(spec.other_model for spec in plan)], subject, stack)
        context = AttackContext(
            num_classes=subject.num_classes,
            eps=float(eps),
            norm=norm,
            steps=config.steps,
            eot_iter=config.eot_iter,
            seed=config.seed,
            draws_differ=subject.is_random,
            judge_draws=5,
            batch_size=in_batch,
            max_forward_batch=config.max_forward_batch,
            graphs=StepGraphs(config.cuda_graphs),
            copies=GradientCopies(),
        )
        context = _knowing(context, config)
        served = None
        if out is not None or team.world > 1:
            # The choice of kernels must not change during the evaluation.
            served = team.from_first("kernels", lambda: kernels_now(device))
            stack.enter_context(keep_kernels(served))
        cache = RowCache(None)
        if out is not None and team.rank == 0:
            if mark[0] is None:
                logger.warning("out: %s %s: its rows are not kept", name, mark[1])
            cache = _kept_rows(RowCache(Path(out), served, revision), subject, others, mark[0])
        if config.batch_size == "auto":
            make_room(subject, others, config.memory, cache)
            at_once = team.from_first("images at once", lambda: subject.room.limit(context.max_forward_batch))
            context = replace(context, max_forward_batch=at_once)
        progress = progress and team.rank == 0
        shown = Progress(name, progress)
        measure = Measure(subject, context, name, cache=cache, progress=shown, team=team, keep_all=config.keep == "all")
        about_draws = {"random": subject.is_random} | judging
        witnessed = None if config.keep == "some" else _about_model(subject, mark[0]) | about_draws
        acting = _Acting(plan, protocol in SEARCHES, measure, stack)
        return _filled(
            report,
            acting,
            mark=mark[0],
            before=before,
            chunks=chunks,
            radii=radii,
            witnessed=witnessed,
        )


def _check_moves(eps: float, attacked: bool) -> None:
    """Raise ValueError for a radius of 0 if anything is attacked."""
    if eps == 0 and attacked:
        raise ValueError(
            "eps must be above 0, got 0: no image could be moved, and every attack would find nothing. Give the "
            "radius to attack at, such as 8/255; for the accuracy on clean images alone, give attacks=[]"
        )


@dataclass
class _Acting:
    """The attacks of an evaluation, which search further if signs of masked gradients are found before them.

    Args:
        plan: the attacks without such signs.
        acts: whether they search further: true for a protocol, false for a list of attacks.
        measure: makes rows.
        stack: keeps models frozen while the evaluation runs.
    """

    plan: Sequence[AttackSpec]
    acts: bool
    measure: Measure
    stack: contextlib.ExitStack

    def act(self, signs: Sequence[str]) -> list[str]:
        """Let every search run to its end, if there are signs; return a sentence that says so."""
        if not (signs and self.acts):
            return []
        subject, context, cache = self.measure.subject, self.measure.context, self.measure.cache
        further = to_the_end(self.plan, subject, ThreatModel(context.norm, float(context.eps)))
        if further == list(self.plan):
            return []
        joined = len(further) - len(self.plan)
        self.plan = further
        _know(cache, _freeze_others([spec.other_model for spec in further], subject, self.stack), subject)
        rows = f", and {joined} row{'s' * (joined > 1)} along the gradients of other models joined" if joined else ""
        return [
            f"signs of masked gradients were found before the attacks: {'; '.join(signs)}. So every search ran on "
            f"every image and to its end{rows}"
        ]


def _filled(
    report: Report,
    acting: _Acting,
    *,
    mark: str | None,
    before: Before | None,
    chunks: Iterator[tuple[Tensor, Tensor, bool]],
    radii: Sequence[float],
    witnessed: dict[str, Any] | None,
) -> Report:
    """The report with its rows; processes other than the first get the first one's report."""
    measure = acting.measure
    subject, context, team = measure.subject, measure.context, measure.team

    def planned() -> tuple[list[AttackSpec], Curve]:
        plan, notes = feasible(acting.plan, subject, context, measure.name)
        report.notes += [note for note in notes if note not in report.notes]
        curve = Curve(attacks_of_curve(plan, context, radii), radii)
        measure.attacks = plan + [spec for radius in radii for spec in curve.specs_at(radius, context.norm)]
        return plan, curve

    plan, curve = planned()
    if team.world > 1:
        team.check_same(_what_is_made(measure, mark))
    if team.rank > 0:
        return _help(measure, before, chunks, lambda signs: acting.act(signs) and planned())
    asked = None if before is None else _ask(measure, before, _costs(plan, measure, curve))
    if asked is not None:
        signs = signs_of_masking(asked, subject.is_random)
        told = acting.act(signs)
        if team.world > 1:
            images = json.dumps(signs).encode()
            team.share(Task(SIGNS, subject.first, subject.data, images, []), lambda _: None, measure.progress)
        report.notes += told
        plan, curve = planned() if told else (plan, curve)
    report.rows = _all_rows(plan, measure, chunks, curve)
    if witnessed is not None:
        _gather(report, measure, witnessed)
    report.rows += worst_rows(report.rows)
    _conclude(report, measure, before, asked)
    for model, points in curve.points(report.rows, measure.name, float(context.eps)).items():
        report.curves[model] = report.curves.get(model, {}) | points
    report.notes += notes_of_unsearched(report.rows) + notes_of_proofs(report.rows)
    report.notes += unusual_radius(report.about.get("dataset"), context.norm, float(context.eps))
    team.end(report.to_json)
    return report


def _about_model(subject: Subject, mark: str | None) -> dict[str, Any]:
    """Facts about the model for the witnesses."""
    return {"model": model_marks(subject.single, mark), "classes": subject.num_classes}


def _gather(report: Report, measure: Measure, about: dict[str, Any]) -> None:
    """Move all fallen images from the rows into the report's witnesses; the rows keep some for pictures."""
    found = gathered(report.rows, about)
    if found is not None:

        def still_wrong(images: Tensor) -> Tensor:
            judge = measure.subject.going_on(images, found.labels, False)
            return torch.from_numpy(~judge.judge(images, "random", "judge").right.all(0))

        report.witnesses = found.small(still_wrong)
    for row in report.rows:
        row.examples = None if row.examples is None else row.examples.first(EXAMPLES)


def _kept_rows(cache: RowCache, subject: Subject, others: Sequence[Classifier], mark: str | None) -> RowCache:
    """The kept rows of a folder, with the marks of the models that they may depend on."""
    cache.know(subject.model, mark)
    _know(cache, others, subject)
    return cache


def _know(cache: RowCache, others: Sequence[Classifier], subject: Subject) -> None:
    """Add the marks of further models to the kept rows."""
    if cache.folder is None:
        return
    for model in others:
        torch.manual_seed(subject.seed)
        model(subject.some())
        cache.know(model, fingerprint(model, cache.revision))


def _what_is_made(measure: Measure, mark: str | None) -> dict[str, Any]:
    """The facts that must be equal in all processes that share an evaluation."""
    subject, context = measure.subject, measure.context
    return {
        "images": subject.data,
        "models": [mark, subject.num_classes, subject.is_random],
        "seed": subject.seed,
        "batch size": [context.batch_size, context.max_forward_batch],
        "attacks": [[row_name(spec, context), measure.settings_of(spec)] for spec in measure.attacks],
    }


def _help(
    measure: Measure,
    before: Before | None,
    chunks: Iterator[tuple[Tensor, Tensor, bool]],
    act: Callable[[list[str]], object],
) -> Report:
    """Make batches, and parts of the probes, for the first process until its report is there.

    Args:
        measure: makes rows.
        before: the answers of the model before the attacks.
        chunks: the images that follow.
        act: called with the signs that the probes gave.
    """
    for task in measure.team.tasks():
        if task.attack == PROBES:
            assert before is not None
            measure.team.give(task, [*_parts(measure, before).values()], measure.progress)
            continue
        if task.attack == SIGNS:
            act(json.loads(task.images))
            continue
        while measure.subject.first < task.first:
            measure.turn_to(measure.subject.going_on(*next(chunks)))
        measure.help(task)
    return Report.from_json(measure.team.report())


def _about(
    config: EvaluateConfig, norm: NormName, eps: float, model: Classifier, device: torch.device
) -> dict[str, str]:
    """The facts common to all rows, and the claim."""
    words = {None: None, "worst_of": "the worst", "votes": "the majority"}[config.predict]
    known = {
        "threat": ball_name(norm, eps),
        "version": f"purify_fast {__version__}",
        "seed": str(config.seed),
        "processor": processor_name(device),
        "precision": precision_name(model, device),
        "claim": None if config.claim is None else f"{config.claim:g}",
        "dataset": config.dataset_name,
        "protocol": config.protocol,
        "predict": words and f"{words} of {config.n_eval} draws",
    }
    return {what: value for what, value in known.items() if value is not None}


def _how_judged(config: EvaluateConfig) -> list[str]:
    """The sentence on how the images of a random model were judged, if ``predict`` was given."""
    draws = f"{config.n_eval} fresh draws of the model"
    sentences = {
        "worst_of": f"each image was judged by the worst of {draws}: it has fallen if any of them is wrong",
        "votes": f"each image was judged by one majority vote of {draws}, and the attacks attacked this vote",
    }
    return [] if config.predict is None else [sentences[config.predict]]


def _knowing(context: AttackContext, config: EvaluateConfig) -> AttackContext:
    """The attacks' context for a way to predict.

    Against the worst of several draws an image has fallen as soon as fresh draws would hardly all be right. A vote
    averages over its draws itself, so a step takes only as many votes as make up the requested draws.
    """
    if config.predict == "worst_of":
        return replace(context, judge_draws=max(5, config.n_eval), judge_share=1 - SURELY ** (1 / config.n_eval))
    if config.predict == "votes":
        most = context.max_forward_batch
        most = None if most is None else max(1, most // config.n_eval)
        return replace(context, votes=config.n_eval, max_forward_batch=most)
    return context


def _first_notes(model: Classifier, subject: Subject, name: str, protocol: ProtocolName | None) -> list[str]:
    """Notes for the report. Modes and probabilities are warned of at once, since an evaluation may take hours."""
    notes = notes_of_modules(model, name)
    for note in notes:
        logger.warning(note)
    if subject.has_probabilities:
        kind = ONE_HOT if subject.has_one_hot else f"returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}"
        logger.warning("%s %s. Its number will be marked", name, kind)
    if subject.draws_once_per_call:
        notes.append(
            f"{name} draws its randomness once per call, for all images of a batch, so each draw is a call of its own: "
            "a step or a judgement by 20 draws takes 20 calls; of other random models they stand in one batch"
        )
    return notes + notes_of_protocol(protocol, model)


def _freeze_others(
    models: Sequence[Classifier | None], subject: Subject, stack: contextlib.ExitStack
) -> list[Classifier]:
    """Freeze the other models that are attacked, each once, and refuse those that write to their input."""
    others = list({id(model): model for model in models if model is not None}.values())
    for model in others:
        stack.enter_context(frozen(model))
        check_leaves_images(model, subject.some()[:1])
    return others


def _protocol_or_attacks(
    protocol: ProtocolName | None, attacks: Sequence[Attack | AttackSpec | AttackFunction] | None
) -> tuple[ProtocolName | None, list[AttackSpec]]:
    """The protocol, which chooses attacks by the model, or None and the listed attacks."""
    if protocol is not None and attacks is not None:
        raise ValueError("give a protocol or a list of attacks, not both")
    given = [] if attacks is None else as_specs(attacks)
    if protocol in ("official", "authors") or any(isinstance(spec.resolved, AutoAttack) for spec in given):
        # If the package is missing, no work begins.
        implementation()
    return ("standard" if protocol is None and attacks is None else protocol), given


def _all_rows(
    plan: Sequence[AttackSpec],
    measure: Measure,
    chunks: Iterable[tuple[Tensor, Tensor, bool]],
    curve: Curve,
) -> list[Row]:
    """The rows of all images: those of the measure, and those of the chunks that follow."""
    subject = measure.subject
    rows, data = _rows(plan, measure, curve), [subject.data]
    for images, labels, more in chunks:
        measure.turn_to(measure.subject.going_on(images, labels, more))
        following = {row.attack: row for row in _rows(plan, measure, curve)}
        rows = [joined(row, following[row.attack]) if row.attack in following else row for row in rows]
        data.append(measure.subject.data)
    if len(data) > 1:
        for row in rows:
            row.data = text_hash(" ".join(data)).hexdigest()
    # Questions about the model are asked on the first images.
    measure.turn_to(subject)
    return rows


def _costs(plan: Sequence[AttackSpec], measure: Measure, curve: Curve) -> list[int | None]:
    """The most forward passes of single images for each row; None if unknown."""
    context, n = measure.context, len(measure.subject.y)
    asked = [(spec.resolved.cost(context), min(n, spec.nearest or n)) for spec in plan]
    asked += [(cost, n) for cost in curve.costs(context)]
    return [None if cost is None else cost * images for cost, images in asked]


def _rows(plan: Sequence[AttackSpec], measure: Measure, curve: Curve) -> list[Row]:
    """The rows of the clean images, one for each variant, those of the attacks in order, and those of the curve.

    The images of an attack on a variant are tried on the deployed model, in a separate row.
    """
    variants: list[Variant] = list(dict.fromkeys(["random", *(spec.variant for spec in plan)]))
    subject, made = measure.subject, measure.progress.rows
    n = len(subject.y)
    # The number of images to come is unknown.
    measure.progress.costs[made:] = [*_costs(plan, measure, curve), *([None] if subject.more else [])]
    all_rows = [measure.clean(variant) for variant in variants]
    # Survivors are tracked for each threat model separately.
    left: dict[tuple[str, str | None], np.ndarray] = {}
    # For each variant, the least margin that any attack has reached.
    margins: dict[tuple[str, str | None], np.ndarray] = {}
    # The images that every attack on all images left.
    standing = measure.clean("random").robust.copy()
    for spec in plan:
        if spec.max_images is not None and spec.max_images <= subject.first:
            continue
        threat = threat_name(spec, measure.context)
        before = {name: left.get((name, threat), measure.clean(name).robust) for name in ("random", spec.variant)}
        reached = margins.setdefault((spec.variant, threat), np.full(n, np.inf))
        rows = [measure.attacked(spec, before[spec.variant], reached)]
        source = ", kept by an earlier run" if measure.cache.was_kept else ""
        if spec.variant != "random" and rows[0].is_attack:
            rows.append(measure.tried(spec, before[spec.variant], before["random"]))
        for row, name in zip(rows, dict.fromkeys([spec.variant, "random"]), strict=False):
            all_rows.append(row)
            measure.progress.finished(f"{row.attack}: {100 * row.accuracy:.1f} % of {row.n} images{source}")
            left[name, threat] = before[name].copy()
            left[name, threat][: row.n] &= row.robust | (not row.is_attack)
            if row.is_attack and row.margins is not None:
                known = margins.setdefault((name, threat), np.full(n, np.inf))
                known[: row.n] = np.fmin(known[: row.n], row.margins)
            if row.is_attack and row.deployed and threat is None and spec.max_images is None:
                standing &= row.robust
    return all_rows + curve.rows(measure, standing)


# -- whether the numbers can be believed ------------------------------------------------------------------------------


def _conclude(report: Report, measure: Measure, before: Before | None, asked: AskedBefore | None) -> None:
    """Add the alarms' findings, the probes' curves and the outlook to a report, and mark doubtful rows.

    Args:
        report: report of one model, with all of its rows.
        measure: made the rows.
        before: the answers of the model before the attacks, for comparison; None: no further questions.
        asked: measurements made before the attacks.
    """
    rows = [row for row in report.rows if row.kind == "clean" or row.is_attack]
    subject = measure.subject
    evidence = Evidence(
        rows,
        classes=subject.num_classes,
        probabilities=subject.has_probabilities,
        one_hot=subject.has_one_hot,
        protocol=report.about.get("protocol"),
    )
    if before is not None and asked is not None:
        probes = _probes(measure, before, asked, evidence)
        evidence = replace(evidence, probes=probes)
        count_fallen(report.rows, probes.fallen, float(measure.context.eps))
    report.findings = [replace(finding, model=measure.name) for finding in findings(evidence)]
    if evidence.probes is not None:
        report.curves[measure.name] = report.curves.get(measure.name, {}) | evidence.probes.curves()
    expected = outlook(evidence)
    if expected is not None:
        report.outlooks = [replace(expected, model=measure.name)]
    doubts = [finding for finding in report.findings if finding.verdict == "unreliable"]
    inconsistent = any(finding.of_answers for finding in doubts)
    # If no attack counted gradients, the probes have followed them.
    followed = evidence.probes is not None and not evidence.with_counted_gradients() and not evidence.blind()
    for row in report.rows:
        # At 0 % there is nothing to doubt: nothing stopped the attacks.
        headline = row.kind == "worst" and row.threat is None and row.deployed
        row.reliable = row.reliable or (headline and followed)
        if headline and doubts and (row.accuracy > 0 or inconsistent):
            row.reliable = False
            row.doubts = [finding.alarm for finding in doubts]


def _parts(measure: Measure, before: Before) -> dict[str, Callable[[], Any]]:
    """The parts of the probes; each is repeated with fewer images at once when memory runs out."""
    room, context = measure.subject.room, measure.context
    model = counted_model(measure.subject.model, measure.progress)

    def make(name: str) -> Any:
        at_once = room.limit(context.max_forward_batch)
        told = replace(context, max_forward_batch=at_once, batch_size=measure.subject.batch_size)
        return parts_of_probes(before, told, model)[name]()

    names = parts_of_probes(before, context, model)
    return {name: functools.partial(room.within, functools.partial(make, name)) for name in names}


def _settings_of_probes(measure: Measure) -> dict[str, Any]:
    """The settings on which answers to the probes depend, besides the model."""
    context, subject = measure.context, measure.subject
    return {
        "probes": 7,
        "data": subject.data,
        "images": PROBED,
        "eps": context.eps,
        "norm": context.norm,
        "seed": subject.seed,
        "eot_iter": context.eot_iter,
        "variant": subject.is_random,
        "batch_size": context.batch_size,
        "max_forward_batch": context.max_forward_batch,
    }


def _ask(measure: Measure, before: Before, later: Sequence[int | None]) -> AskedBefore:
    """The probes that come before the attacks; ``later`` has the highest costs of the rows after them."""
    context, subject, progress = measure.context, measure.subject, measure.progress
    passes = cost_of_probes(subject, context)
    progress.costs = [passes, *later]

    def make() -> dict[str, Any]:
        with progress.row("probes", passes):
            made = _parts(measure, before)
            task = Task(PROBES, subject.first, subject.data, b"", [*range(len(made))])
            values = measure.team.values(task, [*made.values()], progress)
            measured = dict(zip(made, values, strict=True))
            return asdict(subject.room.within(lambda: asked_before(before, context, measured)))

    key = measure.cache.key(_settings_of_probes(measure) | {"before": True}, subject.model)
    asked = AskedBefore(**measure.cache.values(key, make))
    progress.next_row()
    return asked


def _probes(measure: Measure, before: Before, asked: AskedBefore, evidence: Evidence) -> Probes:
    """All probes. Kept answers are used again only after the same attacks, since some are compared with these."""
    context, subject = measure.context, measure.subject
    # Mask of the first images that withstood every attack on the model as it is; all False without an attack.
    n = min(PROBED, len(subject.y), max(row.n for row in evidence.rows))
    robust = evidence.robust(n)
    left = np.zeros(n, dtype=bool) if robust is None else robust

    def make() -> dict[str, Any]:
        return asdict(subject.room.within(lambda: probe(before, context, asked, left.tolist())))

    attacks = {"attacks": [row.attack for row in evidence.rows], "left": digest(torch.from_numpy(left.copy()))}
    key = measure.cache.key(_settings_of_probes(measure) | attacks, subject.model)
    return Probes(**measure.cache.values(key, make))
