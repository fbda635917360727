"""Runs an evaluation: attacks on correctly classified images, fresh predictions on the attacked images, and alarms."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._files import check_folder
from .._process import processes
from .._settings import digest
from .._validation import Count, NormName, Positive, read_norm
from ..attacks import Attack, frozen
from ..attacks.attacked_model import check_eps
from ..attacks.base import ThreatModel, TimeIsOver
from ..ops import kernels_now
from ..protocols import Classifier
from ..speed.memory import peak_so_far
from ..speed.precision import raced_convolutions, whole_float32_by_default
from ..speed.reading import reading
from .alarms import probes as probing
from .alarms.probes import Before, Missing, Probes
from .alarms.signs import Evidence, findings, signs_of_masking
from .request import preparation
from .request.config import USUAL_BATCH, EvaluateConfig, Predict, ProtocolName, config_of
from .request.deadline import DrawsUnderAttack, Subject, device_of
from .request.fingerprint import state_digest
from .request.preparation import AttackFunction, AttackSpec, row_name, threat_name
from .results.cache import RowCache
from .results.rows import CUT, Points, Row, worst_rows
from .run.measure import Measure, Progress, Table, counted_model, settings_of
from .searches.engine import JudgeContext
from .searches.model_tests import check_leaves_images, check_model, strays_frozen
from .shards import Shards
from .show.report import Report, gathered
from .show.text import notes_on_rows, paragraphs

logger = logging.getLogger("purify_fast")

#: "worst_of": an attack succeeds if ``n_eval`` fresh draws would all be correct with at most this probability.
MAX_SURVIVAL = 0.01
#: The largest share of a limit of time that the probes before the attacks take.
PROBES_SHARE = 1 / 3
#: Said of a model that is random only on attacked images.
VARYING = (
    "two predictions of the same attacked images differ, although those of clean images and of images near them were "
    "alike, so it is attacked and judged as a random model"
)

Result = TypeVar("Result")


@whole_float32_by_default()
@torch.inference_mode(False)
def evaluate(
    model: Classifier,
    x: Tensor | Iterable[Sequence[Tensor]],
    y: Tensor | None = None,
    *,
    eps: float,
    norm: NormName = "linf",
    base: Classifier | None = None,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None = None,
    out: str | Path | None = None,
    name: str = "defence",
    revision: str | None = None,
    progress: bool = True,
    protocol: ProtocolName | None = None,
    n_eval: Count | None = None,
    predict: Predict | None = None,
    seed: int | None = None,
    batch_size: Count | None = None,
    steps: Count | None = None,
    eot_iter: Count | None = None,
    minutes: Positive | None = None,
    claim: float | None = None,
    probes: bool | None = None,
    config: EvaluateConfig | None = None,
) -> Report:
    """Run attacks on a model, and report the model's accuracy under the attacks.

    Args:
        model: images ``[B, C, H, W]``, float32 in [0, 1], to logits ``[B, classes]``; any callable that does not write
            to the images. The state of a module and of the random generators is restored. The modules of a plain
            function are not put into evaluation mode; a warning and a note name those in training mode.
        x: images ``[N, C, H, W]``, uint8 or floating point in [0, 1], a tensor or a NumPy array; values outside [0, 1]
            by at most 1e-4 are clamped. Without ``y``, a DataLoader, whose batches (images, labels) are gathered.
        y: labels, integers ``[N]``, a tensor or a NumPy array.
        eps: radius of the ball, in image units; above 0 if there are attacks. An attack's own eps wins.
        norm: norm of the ball: ``linf``, ``l2`` or ``l1``.
        base: an undefended classifier, whose adversarial images are tried on the model; not beside ``attacks``.
        attacks: a list of attacks that replaces a protocol: attacks of `purify_fast.attacks`, such as ``PGD()``;
            functions ``(model, x, y) -> x_adv``, see `as_attack`; or an `AttackSpec`. An empty list measures only the
            clean accuracy.
        out: a folder. Finished rows are cached in ``out/rows``, and used again if settings, data, weights, the model's
            answers for some images and your source files are the same. If the same seed gives other answers in a
            second call, rows are not cached, with a warning.
        name: name of the model in the report.
        revision: a name for the model's version: rows of another name are not used. Choose another name after a change
            that a few images may not show, such as one of a file that the model reads.
        progress: whether to show a progress bar for each attack, which counts forward passes of single images.
        protocol: name of a list of attacks, such as "fast". None: ``attacks``, or else "standard".
        n_eval: number of predictions on each image of a random model; by default 5.
        predict: "worst_of", if the attacks know that any wrong prediction decides.
        seed: seed of all random numbers; by default 0.
        batch_size: number of images that are attacked together; by default 250.
        steps: number of steps of attacks that set none; by default 100.
        eot_iter: number of draws averaged per step, for attacks that set none; by default 5.
        minutes: largest number of minutes that the evaluation may take; by default unlimited.
        claim: a claimed robust accuracy, in percent, which the report tests.
        probes: whether to run the probes; by default with every protocol.
        config: the same settings, explained in `EvaluateConfig`, and rarer settings. A keyword that is given, and is
            not None, wins over the field of the config.

    Returns:
        A `Report` with a clean row, a row for each attack, and ``worst`` rows. In ``worst``, an image is robust only if
        it is robust in all rows, also in rows of AutoAttack and of attacks through other models. In a row of an attack
        on survivors, images that fell before are not robust. Attacks on the first 200 images count for "worst, first
        200". Another threat model with several attacks has a separate ``worst`` row.

    Raises:
        ValueError: a wrong shape, dtype, range or setting; a model that writes to its input, or does not accept every
            batch size; ``predict`` with a deterministic model; ``out`` is a file; or several processes have different
            arguments.
        ConnectionError: another process has ended.
        TypeError: images or labels are neither tensors nor arrays, or another argument has a wrong type.
        ModuleNotFoundError: an attack needs AutoAttack's package, which is not installed.
    """
    # A keyword of this call that is a field of the config wins over the field.
    config = config_of(config, locals())
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model must be a module or a function from images to logits, got {model!r}")
    check_folder("out", out)
    norm = read_norm(norm)
    check_eps(eps, norm)
    images, labels, notes = preparation.collect(*preparation.of_loader(x, y))
    # A ball that contains every image is refused.
    check_eps(eps, norm, pixels=images[0].numel())
    ball, folder = ThreatModel(norm, float(eps)), None if out is None else Path(out)
    config, specs = preparation.read_attacks(config, attacks, ball, images[0].numel())
    until = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    evaluation = _Evaluation(model, images, labels, ball, config, base=base, attacks=specs, until=until, notes=notes)
    evaluation = replace(evaluation, out=folder, name=name, revision=revision, progress=progress)
    with contextlib.suppress(DrawsUnderAttack):
        return evaluation.run()
    if not config.together or processes()[0] == 0:
        logger.warning("%s: %s. The evaluation begins again", name, VARYING)
    # The first run has freed its memory before the second begins.
    evaluation = replace(evaluation, draws=True)
    return evaluation.run()


def _context(config: EvaluateConfig, subject: Subject, ball: ThreatModel) -> JudgeContext:
    # An evaluation only hands these to the attacks, which take fast copies and captured steps from them.
    from ..attacks.gradient_copy import Copies
    from ..speed.graphs.graphed_loop import StepGraphs

    draws, share, votes, most = 5, 1.0, subject.votes, config.max_forward_batch
    # "fast" ends the search of an image at a point that counts as fallen, and does not look for a worse one.
    # A claim is tested by the accuracy of one draw, which a worse point lowers.
    if config.predict == "worst_of" or (config.protocol == "fast" and config.predict is None and config.claim is None):
        draws, share = max(draws, subject.judges), 1 - MAX_SURVIVAL ** (1 / subject.judges)
    # Every draw of a vote passes all images.
    most = None if most is None else max(1, most // votes)
    return JudgeContext(
        num_classes=subject.num_classes,
        eps=ball.eps,
        norm=read_norm(ball.norm),
        steps=config.steps,
        eot_iter=-(-config.eot_iter // votes),
        seed=config.seed,
        draws_differ=subject.is_random,
        shares_draws=subject.shares_draws,
        judge_draws=draws,
        judge_share=share,
        batch_size=config.batch_size or USUAL_BATCH,
        max_forward_batch=most,
        graphs=StepGraphs(config.cuda_graphs, cudnn_benchmark=config.cudnn_benchmark),
        copies=Copies(subject.sample_images()),
    )


@dataclass
class _Evaluation:
    """A run of an evaluation, with the checked arguments of `evaluate`."""

    model: Classifier
    x: Tensor
    y: Tensor
    ball: ThreatModel
    config: EvaluateConfig
    attacks: list[AttackSpec]
    #: The value of `time.monotonic` at which the time is over.
    until: float
    notes: list[str]
    base: Classifier | None = None
    out: Path | None = None
    name: str = ""
    revision: str | None = None
    progress: bool = True
    #: Whether the model is known to be random.
    draws: bool = False

    def run(self) -> Report:
        """Run the evaluation. Raises DrawsUnderAttack if only now it shows that the model is random."""
        config, model, name, device = self.config, self.model, self.name, device_of(self.model, self.x)
        self.report = report = Report(about=preparation.facts(config, self.ball, model, device), notes=list(self.notes))
        #: The parts that were left out because the time was over, the tables by threat model, and the ids of models.
        self.left_out, self.tables, self.admitted = list[str](), dict[str | None, Table](), set[int]()
        with contextlib.ExitStack() as self.stack:
            enter = self.stack.enter_context
            shards = enter(Shards(config.together))
            enter(torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []))
            enter(torch.no_grad())
            enter(raced_convolutions(config.cudnn_benchmark, device))
            modes = preparation.note_of_modes(model, name)
            enter(frozen(model))
            enter(reading(model, self.base, *(spec.through for spec in self.attacks)))
            judging: dict[str, Any] = {"n_eval": config.n_eval, "predict": config.predict, "seed": config.seed}
            size = config.batch_size or USUAL_BATCH
            with strays_frozen(model, self.stack) as strays:
                self.subject = subject = Subject(model, self.x, self.y, batch_size=size, draws=self.draws, **judging)
            modes += preparation.note_of_modes(model, name, strays) if strays else []
            weights = state_digest(model)
            report.about |= {"model": weights} if weights else {}
            if subject.mistake:
                logger.warning("%s %s. The report will mark its accuracy", name, subject.mistake)
            report.notes += [f"the model: {VARYING}"] * self.draws
            report.notes += paragraphs("first_notes.jinja", subject=subject, config=config, name=name, modes=modes)
            probes = config.protocol is not None if config.probes is None else config.probes
            self.before = subject.batch_limit.within(lambda: Before(subject)) if probes else None
            context = _context(config, subject, self.ball)
            cache = RowCache(self.out if shards.rank == 0 else None, kernels_now(device), self.revision)
            cache.register(name, model, subject.asked_images())
            shown = Progress(name, self.progress and shards.rank == 0, deadline=subject.deadline)
            self.measure = Measure(subject, context, name, cache, progress=shown, shards=shards)
            return self.fill({"random": subject.is_random, "precision": report.about.get("precision"), **judging})

    def planned(self) -> Sequence[AttackSpec]:
        """The attacks of the protocol, or those of the caller, whose models are admitted."""
        config, specs = self.config, self.attacks
        if config.protocol is not None:
            specs = preparation.protocol_attacks(config.protocol, self.subject, self.ball, self.base, config.steps)
        self.admit(specs)
        return specs

    def admit(self, specs: Sequence[AttackSpec]) -> None:
        """Freeze and check the other models that attacks use, and register them in the cache."""
        subject, cache = self.subject, self.measure.cache
        followed = [(f"through of {row_name(spec, self.measure.context)!r}", spec.through) for spec in specs]
        for what, model in [("base", self.base), *followed]:
            if model is None or id(model) in self.admitted:
                continue
            self.admitted.add(id(model))
            self.stack.enter_context(frozen(model))
            timed_model = subject.deadline.watch(model)
            check_leaves_images(timed_model, subject.sample_images()[:1])
            if (classes := check_model(timed_model, subject.sample_images())) != subject.num_classes:
                raise ValueError(f"{what} must have the {subject.num_classes} classes of the model, got {classes}")
            # Without a name for the rows of the judged model itself, there is none for rows of others.
            if cache.key({}, subject.model) is not None:
                cache.register(f"attacks through {type(model).__name__}", model, subject.asked_images())

    def fill(self, about: dict[str, Any]) -> Report:
        """Run the attacks and return the report; all other processes return the report of the first process."""
        report, measure, subject = self.report, self.measure, self.subject
        context, shards = measure.context, measure.shards
        self.choose_attacks(self.in_time("the plan of the attacks", self.planned) or [])
        attacks = [[row_name(spec, context), settings_of(spec, subject, context)] for spec in measure.attacks]
        models = [report.about.get("model"), subject.num_classes, subject.is_random]
        same = {"images": subject.data, "models": models, "seed": subject.seed, "attacks": attacks}
        shards.check_same(same | {"batch size": [context.batch_size, context.max_forward_batch]})
        first_probes = self.probe()
        # Nothing predicts how long the searches take.
        measure.progress.total = len(measure.attacks)
        measure.progress.say(f"plan: {len(measure.attacks)} attacks on {len(subject.y)} images")
        if shards.rank > 0:
            return Report.from_json(measure.follow())
        report.rows = self.rows()
        fallen = [point for table in self.tables.values() for point in table.fallen()]
        report.adversarial = gathered(fallen, subject, about)
        subject.deadline.begin(self.until)
        self.conclude(first_probes)
        if subject.deadline.over:
            self.left_out.append("the questions of the signs after the attacks")
        self.tell_what_was_left_out()
        headline = report.lowest.get(None)
        report.notes += notes_on_rows(report.rows, headline)
        if headline is None and self.config.claim is not None:
            claim = f"the claim of {self.config.claim:g} % is not tested"
            report.notes.append(f"no attack ran within {report.about['threat']}, so {claim}")
        elif headline is not None and (test := report.claim_test(headline)) is not None:
            report.about["claim_test"] = test.verdict
        if torch.bfloat16 in context.copies.dtypes:
            report.about["gradients"] = "of a frozen copy in bfloat16; the model itself judges"
        if context.graphs.may_capture(subject.device):
            steps = context.graphs.facts
            report.about["captured"] = "; ".join([f"{steps['captured']} captured", *steps.get("not_captured", ())])
        passes, n = measure.progress.images + subject.passes, len(subject.y)
        if shards.world == 1 and not measure.cache.used:
            # Otherwise other processes or earlier runs have made a part of the passes.
            gradients = f"{passes.gradients / n:,.0f} gradients per image"
            report.about["passes"] = f"{passes.forwards / n:,.0f} forward passes and {gradients}"
        report.about["seconds"] = f"{time.monotonic() - measure.progress.began:.1f}"
        report.about["peak_memory"] = f"{peak_so_far(subject.device) / 1e9:.2f} GB"
        shards.end(report.to_json)
        return report

    def in_time(self, what: str, make: Callable[[], Result], until: float | None = None) -> Result | None:
        """Call ``make`` in all processes until the time is over for the first; None, in all, if it has no result.

        ``until`` is the end of this time, by default that of the evaluation. If it is over, ``what`` was left out.
        """
        deadline, shards, result = self.subject.deadline, self.measure.shards, None
        deadline.begin(math.inf if shards.rank > 0 else self.until if until is None else until)
        with contextlib.suppress(TimeIsOver):
            result = make()
        if deadline.over:
            self.left_out.append(what)
        deadline.begin()
        return result if shards.from_first(lambda: result is not None) else None

    def probe(self) -> Probes | None:
        """Run the probes before the attacks, and choose other attacks if they found signs of masked gradients."""
        before = self.before
        if self.measure.shards.rank == 0:
            # Judge the clean images before the probes, so that the time of a judgement is known.
            self.measure.judging()
        if before is None:
            return None
        now = time.monotonic()
        until = now + PROBES_SHARE * max(0.0, self.until - now)
        probes = self.in_time("probes before the attacks", lambda: self.measure_before_attacks(before), until)
        if probes is not None:
            stronger = self.in_time("the attacks for masked gradients", lambda: self.strengthen(probes))
            if stronger:
                self.choose_attacks(stronger)
        return probes

    def choose_attacks(self, specs: Sequence[AttackSpec]) -> None:
        """Select the attacks that the model allows."""
        measure, self.specs = self.measure, specs
        measure.attacks, notes = preparation.feasible(specs, self.subject, measure.context, self.name)
        self.report.notes += [note for note in notes if note not in self.report.notes]

    def strengthen(self, probes: Probes) -> list[AttackSpec]:
        """Return stronger attacks for signs of masked gradients in a protocol in `SEARCHES`; without signs, none."""
        signs, protocol = signs_of_masking(probes, self.subject.is_random), self.config.protocol
        if not signs or protocol not in preparation.SEARCHES:
            return []
        quick, subject = protocol == "fast", self.subject
        own = self.specs[:1] if quick and subject.is_random and probes.is_blind else self.specs
        further = preparation.without_early_stops(own, subject, self.ball, probes.order, quick)
        if further == list(self.specs):
            return []
        self.admit(further)
        joined = len(further) - len(own)
        added = f"{joined} rows were added" if joined > 1 else "a row was added"
        rows = f", and {added} for attacks along the gradients of other models" if joined else ""
        self.report.notes.append(
            f"signs of masked gradients were found before the attacks: {'; '.join(signs)}. So every attack "
            f"searched all images that had not fallen, and took all of its steps{rows}"
        )
        return further

    # -- the rows -----------------------------------------------------------------------------------------------------

    def table(self, threat: str | None) -> Table:
        """The attacks so far in a threat model."""
        return self.tables.setdefault(threat, Table([self.measure.clean]))

    def rows(self) -> list[Row]:
        """Make the row of the clean images, and the rows of the attacks."""
        measure, deadline = self.measure, self.subject.deadline
        rows = [measure.clean]
        for spec in measure.attacks:
            table = self.table(threat_name(spec, measure.context))
            # A search ends early enough for the judgement of its images.
            deadline.begin(self.until - measure.judging())
            try:
                rows.append(measure.attacked(spec, table))
            except TimeIsOver:
                self.left_out.append(row_name(spec, measure.context))
                continue
            finally:
                deadline.begin()
            table.add(row := rows[-1])
            share = f"{row.attack}: {100 * row.accuracy:.1f} % of {row.n} images{measure.cache.source}"
            measure.progress.say(share)
        return rows

    def tell_what_was_left_out(self) -> None:
        """Add a note on what the limit of time has left out, if it might have changed the headline."""
        cut = [row.attack for row in self.report.rows if CUT in row.warnings]
        left, planned = int(self.measure.withstood(self.table(None).points.wrong).sum()), self.measure.attacks
        self.report.notes += paragraphs("time.jinja", left_out=self.left_out, cut=cut, left=left)
        attacks = {row_name(spec, self.measure.context) for spec in planned} & {*self.left_out}
        if left and (attacks or cut):
            ended = f"{len(attacks)} of {len(planned)} attacks were left out, and {len(cut)} cut short"
            self.report.about["ended"] = f"the time was over: {ended}; they might have broken more images"

    # -- the probes, and the alarms, which judge whether the numbers are reliable --------------------------------------

    def conclude(self, measured: Probes | None) -> None:
        """Add the ``worst`` rows, the alarms' findings and the probes' curves to the report, and mark doubtful rows."""
        report, subject = self.report, self.subject
        evidence, probed = Evidence(report.rows, subject=subject), None
        if self.before is not None and measured is not None:
            probes = self.all_probes(self.before, measured, evidence)
            evidence = replace(evidence, probes=probes)
            probed = self.column(probes)
            report.curves |= probes.curves()
        else:
            with contextlib.suppress(TimeIsOver):
                evidence = replace(evidence, cosine=self.compared_gradients(evidence.with_counted_gradients()))
        report.rows = [*report.rows, *worst_rows(report.rows, probed)]
        report.findings = [replace(finding, model=self.name) for finding in findings(evidence)]
        doubts = [finding for finding in report.findings if finding.verdict == "unreliable"]
        inconsistent = any(finding.of_answers for finding in doubts)
        # If no attack counted gradients, the headline is still reliable if the probes could use the model's gradients.
        followed = evidence.probes is not None and not evidence.with_counted_gradients() and not evidence.blind()
        for row in report.rows:
            # An accuracy of 0 % cannot be too high, so only inconsistent predictions are then a reason for doubt.
            headline = row.kind == "worst" and row.threat is None
            row.reliable = row.reliable or (headline and followed)
            if headline and doubts and (row.accuracy > 0 or inconsistent):
                row.reliable = False
                row.doubts = [finding.alarm for finding in doubts]

    def compared_gradients(self, counted: Sequence[Row]) -> float | Missing | None:
        """Compare the gradients that attacks counted with small steps, without the probes; None if it is not asked."""
        subject = self.subject
        # The gradients of BPDA and of surrogates are approximations by design.
        approximate = getattr(type(subject.base_model), "approximates_gradients", False)
        if approximate or self.config.probes is not None or all(row.settings.get("through") for row in counted):
            return None
        return subject.batch_limit.within(lambda: probing.compared_gradients(subject, self.measure.context))

    def column(self, probes: Probes) -> Row:
        """The column of the probes: the points of the images that fell to them, and the clean points of the others."""
        subject, row = self.subject, replace(self.measure.clean)
        # On a random model, a probe's point also counts if it is worse than the points of the attacks.
        fallen = torch.tensor(probes.found() if subject.is_random else probes.fallen(), dtype=torch.int64, device="cpu")
        wrong, margins, right = row.points.at(fallen.numpy())
        points = Points(np.ones_like(wrong), np.full_like(margins, -np.inf), np.zeros_like(right))
        if probes.points is not None and len(fallen):
            images = probes.points[fallen].to(subject.x.device)
            chosen, judged = (subject.judge(images, phase, fallen) for phase in ("choose", "judge"))
            points = Points(chosen.wrong, chosen.margins, judged.right)
        row.take(row.points.put(fallen.numpy(), points))
        return row

    def kept_probes(self, more: dict[str, Any], ask: Callable[[], Probes]) -> Probes | None:
        """Probes from the cache, named by their settings and ``more``, or from ``ask``; None if the time was over."""
        context, subject = self.measure.context, self.subject
        ball = [context.eps, context.norm, context.eot_iter, context.batch_size, context.max_forward_batch]
        settings = {"probes": [probing.PROBED, subject.data, subject.seed, subject.is_random, *ball]}
        key = self.measure.cache.key(settings | more, subject.model)
        with contextlib.suppress(TimeIsOver):
            # If memory runs out, the probes run again with fewer images at once.
            return Probes(**self.measure.cache.values(key, lambda: asdict(subject.batch_limit.within(ask))))
        return None

    def measure_before_attacks(self, before: Before) -> Probes | None:
        """Run the probes before the attacks, in the first process.

        The result is None if the time was over before the first images were probed.
        """
        measure, settled = self.measure, functools.partial(signs_of_masking, is_random=True)
        model = counted_model(self.subject.model, measure.progress)

        def ask() -> Probes:
            with measure.progress.row("probes before the attacks"):
                return probing.measure_before_attacks(before, measure.context, model, settled)

        return measure.shards.from_first(lambda: self.kept_probes({}, ask))

    def all_probes(self, before: Before, measured: Probes, evidence: Evidence) -> Probes:
        """Return the results of all probes; cached results are used only if the attacks before them were the same."""
        wrong = evidence.wrong(measured.n)
        # The images that withstood every attack; without an attack, none.
        left = np.zeros(measured.n, dtype=bool) if wrong is None else wrong == 0
        measured = replace(measured, left=left.tolist())
        attacks = {"attacks": [row.attack for row in evidence.rows], "left": digest(torch.tensor(left, device="cpu"))}
        ask = functools.partial(probing.probe, before, self.measure.context, measured)
        return self.kept_probes(attacks, ask) or replace(measured, whole=False)
