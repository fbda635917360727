"""The evaluation: every attack on every image the model classifies, judged by fresh predictions, with gradient health.

A row is one attack. The model is attacked and judged in one of three variants: ``random``, as it is; ``fixed``, under
``model.fixed_noise(seed)``; ``deterministic``, under ``model.deterministic()``. Any callable can be evaluated; those
context managers, and ``sample_logits``, are used where the model has them, and checked before. What an attack on a
variant found is tried on the model as it is, which alone has the headline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._validation import CudaGraphs, CudnnBenchmark, check_folder, check_literal
from .._version import __version__
from ..attacks import BPDA, Attack, AttackContext, AutoAttack, frozen
from ..attacks.answers import check_leaves_images
from ..attacks.arguments import NormName, check_at_least_one, read_norm
from ..attacks.autoattack import implementation
from ..attacks.engine.gradient_copy import GradientCopies
from ..ops import decisions, held
from ..protocols import Classifier, DeterministicMode, FixedNoise, SampleLogits, has_classifier, is_purifier, supports
from ..speed.graphs.step_graphs import StepGraphs
from ..speed.precision import raced_convolutions, whole_float32_by_default
from .alarms.answers import Before
from .alarms.probes import cost as cost_of_probes
from .around import notes_of_modules
from .believe import conclude
from .copies import refresh_stale_copies
from .customary import check_radius, unusual_radius
from .fingerprint import fingerprint, fingerprint_or_reason
from .function_attack import AttackFunction
from .images import collect
from .interrupted import short_interrupts
from .labels import ball_name, pgd_in_float32, precision_name, row_name, threat_name
from .measure import Measure
from .outputs import INSTEAD_OF_PROBABILITIES, as_classifier
from .progress import Progress
from .protocols import AttackedModel, ProtocolName, notes_of_protocol, protocol_attacks
from .report import Report
from .row_cache import RowCache
from .rows import Row
from .specs import CLASSIFIER, AttackSpec, as_specs
from .subject import Subject, Variant, device_of
from .worst import worst

logger = logging.getLogger("purify_fast")


@short_interrupts
@whole_float32_by_default()
@torch.inference_mode(False)
def evaluate(
    defence: Classifier,
    x: Tensor | Iterable[Any],
    y: Tensor | None = None,
    *,
    eps: float,
    norm: NormName = "linf",
    base: Classifier | None = None,
    protocol: ProtocolName | None = None,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None = None,
    steps: int = 100,
    eot_iter: int = 5,
    n_eval: int = 5,
    batch_size: int = 250,
    max_forward_batch: int | None = None,
    cuda_graphs: CudaGraphs = "auto",
    cudnn_benchmark: CudnnBenchmark = "off",
    seed: int = 0,
    out: str | Path | None = None,
    name: str = "defence",
    dataset_name: str | None = None,
    probes: bool | None = None,
    progress: bool = True,
) -> Report:
    """Attack a model in every way asked for, and report what it withstands.

    Args:
        defence: images ``[B, C, H, W]`` float32 in [0, 1] to logits ``[B, classes]``; any callable that does not write
            to the images. A module's mode, ``requires_grad`` flags and weights, and the random generators, are
            afterwards as they were; so are those of modules that it holds in plain lists, objects or hooks. A function
            is called as it is: put the modules that it uses into evaluation mode yourself. Those in training mode that
            it can be seen to use are told in a warning and in the report's notes.
        x: images ``[N, C, H, W]``, uint8 or float32 in [0, 1]; or, without ``y``, a DataLoader or any other iterable of
            batches (images, labels) or (images, labels, indices), which is read once and kept in memory.
        y: labels, int64 ``[N]``.
        eps: radius of the ball, in image units; above 0 where anything is attacked.
        norm: of the ball: ``linf``, ``l2`` or ``l1``.
        base: an undefended classifier: its adversarial images are tried on the defence.
        protocol: which attacks are run, by name: "fast", Auto-PGD in minutes; "standard", AutoAttack's four with this
            package's engine; "rand", AutoAttack's version for random models; "strong", what a careful attacker would
            do, with surrogates, restarts and every target; "official", AutoAttack itself; "authors", what those
            who published the defence ran, to compare with their numbers, in no headline. The last two need the package
            pyautoattack. See `purify_fast.evaluation.protocols`. None: "standard", unless ``attacks`` are given.
        attacks: what to run in place of a protocol: attacks of `purify_fast.attacks`, such as ``PGD()``; functions
            ``(model, x, y) -> x_adv``, which `as_attack` describes; or `AttackSpec` around either. An empty list: the
            accuracy on clean images alone. Variants that the defence lacks, or that are not what they promise (noise
            that `fixed_noise` does not fix), are left out, with a note.
        steps: of PGD and APGD where an attack does not say.
        eot_iter: draws per step where an attack does not say; a deterministic model is attacked with one draw.
        n_eval: independent predictions on each adversarial image; 1 for a deterministic model.
        batch_size: images attacked together.
        max_forward_batch: images in one forward pass of an attack at most (exact); None: no limit.
        cuda_graphs: on a CUDA device, "auto" captures a step of an attack once and replays it where launching takes
            longer than computing; "always" wherever that is possible, "off" never. Choose "off" for a model that keeps
            settings in an object of a class of its own, no module, dataclass or namespace, and changes them there while
            it is attacked: a captured step does not see it.
        cudnn_benchmark: on a CUDA device, "on" and "auto" let cuDNN race its algorithms once for each shape of a batch,
            "auto" not where the process asks for deterministic ones. Which one wins may differ from run to run, and
            with it the last bits of a gradient.
        seed: of everything random.
        out: a folder; each finished row is kept in ``out/rows`` and used again where settings, weights, data and the
            code of the model's classes agree. Rows of models without weights to compare (plain callables), and of those
            that hold something that cannot be compared by its value, are made anew; a warning says so.
        name: of the model, in the report.
        dataset_name: of the data set, for the report's title.
        probes: whether the model is also asked what tells whether the number can be believed: short attacks on a few
            images over the radius, the steps and the draws, small steps in random directions, the same images again.
            None: with every protocol but "authors", and not with a list of attacks.
        progress: whether to show a bar for each attack: forward passes of single images.

    Returns:
        A `Report`: a clean row per variant, a row per attack, and rows named ``worst``: per image over every row of the
        deployed model, AutoAttack and transferred images included; a row of survivors brings in what fell before it.
        What an attack on a variant found is tried on the deployed model, in a second row, which enters ``worst``; the
        first enters "worst, fixed" or "worst, deterministic" alone. Attacks on the first 200 images enter "worst, first
        200" instead, with what all others found on these. Of any other threat model with several attacks, a ``worst``
        of its own.

    Raises:
        ValueError: a wrong shape, dtype, range or setting, a model that writes to its input, or ``out`` is a file.
        KeyboardInterrupt: Ctrl-C, with a message that says how to go on and without the frames of the attack.
        TypeError: images or labels that are no tensors, or an attack that is none.
        ModuleNotFoundError: AutoAttack is asked for and missing.
    """
    check_folder("out", out)
    images, labels = collect(x, y)
    norm = read_norm(norm)
    counts = {"steps": steps, "eot_iter": eot_iter, "n_eval": n_eval, "batch_size": batch_size}
    check_at_least_one(**counts, max_forward_batch=max_forward_batch)
    protocol, given = _asked_for(protocol, attacks)
    check_radius(eps, norm, attacked=bool(given or protocol or probes))
    about = {"threat": ball_name(norm, eps), "version": f"purify_fast {__version__}", "seed": str(seed)}
    named = {"dataset": dataset_name, "protocol": protocol, "precision": _precision(defence, images)}
    report = Report(about=about | {what: value for what, value in named.items() if value is not None})
    defence = as_classifier(defence)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda_devices(defence, images)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(raced_convolutions(cudnn_benchmark, device_of(defence, images)))
        stack.enter_context(frozen(defence))
        refresh_stale_copies(defence, base, *(spec.other_model for spec in given))
        subject = Subject(defence, images, labels, batch_size=batch_size, n_eval=n_eval, seed=seed)
        mark = (None, "") if out is None else fingerprint_or_reason(subject.model)
        report.notes += _told_at_once(defence, subject, name) + notes_of_protocol(protocol, defence)
        before = Before(subject) if (protocol not in (None, "authors") if probes is None else probes) else None
        plan = given if protocol is None else protocol_attacks(protocol, _known(subject, eps, base))
        others = _freeze_others([base, *(spec.other_model for spec in plan)], subject, stack)
        context = AttackContext(
            num_classes=subject.num_classes, eps=float(eps), norm=norm, steps=steps, eot_iter=eot_iter, seed=seed,
            max_forward_batch=max_forward_batch, batch_size=batch_size, graphs=StepGraphs(cuda_graphs),
            copies=GradientCopies(),
        )  # fmt: skip
        cache = None if out is None else stack.enter_context(_kept_in(Path(out), subject, name, mark, others))
        measure = Measure(subject, context, name, cache=cache, progress=Progress(name, progress, []))
        more = 0 if before is None else cost_of_probes(subject, context)
        _add_rows(report, _possible(plan, measure, report.notes), measure, more)
        report.rows += worst(report.rows)
        conclude(report, measure, before)
    report.notes += _nonfinite(report.rows) + unusual_radius(dataset_name, norm, eps)
    return report


def _told_at_once(defence: Classifier, subject: Subject, name: str) -> list[str]:
    """Notes for the report, which are logged now, as are probabilities: an evaluation may take hours."""
    notes = notes_of_modules(defence, name)
    for note in notes:
        logger.warning(note)
    if subject.has_probabilities:
        logger.warning("%s returns probabilities, not logits, and its number will be marked: %s", name,
                       INSTEAD_OF_PROBABILITIES)  # fmt: skip
    if subject.draws_once_per_call:
        notes.append(
            f"{name} draws its randomness once per call, for all images of a batch, so each draw is a call of its own: "
            "a step or a judgement by 20 draws takes 20 calls; of other random models they stand in one batch"
        )
    return notes


def _freeze_others(
    models: Sequence[Classifier | None], subject: Subject, stack: contextlib.ExitStack
) -> list[Classifier]:
    """Freeze the other models that are attacked until the stack ends, and refuse those that write to their input.

    Args:
        models: the other models; None and repetitions are left out.
        subject: the model with its images.
        stack: ends with the evaluation.

    Returns:
        The models, each once.
    """
    others = list({id(model): model for model in models if model is not None}.values())
    for model in others:
        stack.enter_context(frozen(model))
        check_leaves_images(model, subject.some()[:1])
    return others


@contextlib.contextmanager
def _kept_in(
    out: Path, subject: Subject, name: str, mark: tuple[str | None, str], others: Sequence[Classifier]
) -> Iterator[RowCache]:
    """The rows kept in a folder; within the block the races that decide who serves stay as they are.

    Args:
        out: the folder.
        subject: the model with its images.
        name: of the model.
        mark: the model's fingerprint, or None and why it has none; taken after the predictions of the subject, so that
            a model that keeps what it saw last has always seen the same.
        others: the other models that rows depend on. Their fingerprints are taken now, after a prediction too.
    """
    found, reason = mark
    if found is None:
        logger.warning("out: %s %s: its rows are not kept", name, reason)
    served = decisions(subject.device)
    with held(served):
        cache = RowCache(out, served)
        cache.know(subject.model, found)
        for model in others:
            torch.manual_seed(subject.seed)
            model(subject.some())
            cache.know(model, fingerprint(model))
        yield cache


def _asked_for(
    protocol: ProtocolName | None, attacks: Sequence[Attack | AttackSpec | AttackFunction] | None
) -> tuple[ProtocolName | None, list[AttackSpec]]:
    """The protocol, which asks the model what to run, or None and the attacks that were listed."""
    if protocol is not None:
        check_literal("protocol", protocol, ProtocolName)
        if attacks is not None:
            raise ValueError("give a protocol or a list of attacks, not both")
    given = [] if attacks is None else as_specs(attacks)
    if protocol in ("official", "authors") or any(isinstance(spec.resolved, AutoAttack) for spec in given):
        # if it is missing, no work is begun
        implementation()
    return ("standard" if protocol is None and attacks is None else protocol), given


def _known(subject: Subject, eps: float, base: Classifier | None) -> AttackedModel:
    return AttackedModel(subject.model, subject.some(), subject.num_classes, subject.is_random, float(eps), base=base)


def _precision(defence: Classifier, x: Tensor) -> str | None:
    return precision_name(defence, device_of(defence, x))


def _cuda_devices(defence: Classifier, x: Tensor) -> list[int]:
    device = device_of(defence, x)
    return [device.index or 0] if device.type == "cuda" else []


def _add_rows(report: Report, plan: Sequence[AttackSpec], measure: Measure, probes: int) -> None:
    """The rows of the clean images, one for each variant, and of the attacks, in the order of the plan.

    What an attack on a variant found is tried on the deployed model, in a row of its own.

    Args:
        report: gets the rows.
        plan: the attacks.
        measure: makes the rows.
        probes: images that the probes after the attacks give to the model; 0 for none.
    """
    variants: list[Variant] = list(dict.fromkeys(["random", *(spec.variant for spec in plan)]))
    costs = [spec.resolved.cost(measure.context) for spec in plan]
    measure.progress.costs = [None if cost is None else cost * len(measure.subject.y) for cost in costs]
    measure.progress.costs += [probes] if probes else []
    for variant in variants:
        report.rows.append(measure.clean(variant))
    # an attack spares nothing that fell to another threat model
    left: dict[tuple[str, str | None], np.ndarray] = {}
    for spec in plan:
        threat = threat_name(spec, measure.context)
        before = {name: left.get((name, threat), measure.clean(name).robust) for name in ("random", spec.variant)}
        rows = [measure.attacked(spec, before[spec.variant])]
        kept = ", kept by an earlier run" if measure.cache is not None and measure.cache.was_kept else ""
        if spec.variant != "random" and rows[0].is_attack:
            rows.append(measure.tried(spec, before[spec.variant], before["random"]))
        for row, name in zip(rows, dict.fromkeys([spec.variant, "random"]), strict=False):
            report.rows.append(row)
            measure.progress.finished(f"{row.attack}: {100 * row.accuracy:.1f} % of {row.n} images{kept}")
            left[name, threat] = before[name].copy()
            left[name, threat][: row.n] &= row.robust | (not row.is_attack)


def _possible(plan: Sequence[AttackSpec], measure: Measure, notes: list[str]) -> list[AttackSpec]:
    """The attacks this model allows; for a deterministic one, every variant is the model as it is.

    A variant that is not what its name promises is attacked by nothing: no number of it would mean anything.
    """
    subject = measure.subject
    kept: list[AttackSpec] = []
    for spec in plan:
        why = _impossible(spec, subject)
        if why is not None:
            notes.append(f"{measure.name}: {measure.name_of(spec)} was left out: {why}")
            continue
        fault = subject.fault(spec.variant)
        if fault is not None:
            notes.append(f"{measure.name}: {measure.name_of(spec)} was left out: {fault.reason}")
            logger.warning(notes[-1])
            continue
        if not subject.is_random:
            spec = dataclasses.replace(spec, variant="random")
        if not any(_again(spec, before, measure) for before in kept):
            kept.append(spec)
    notes += pgd_in_float32(kept, precision_name(subject.model, subject.device), subject.device)
    return _named_apart(kept, measure)


def _again(spec: AttackSpec, before: AttackSpec, measure: Measure) -> bool:
    """Whether the same model would be attacked on the same images by the same attack again."""
    subject = measure.subject
    if measure.name_of(spec) != measure.name_of(before) or _on_all(spec, subject) != _on_all(before, subject):
        return False
    # of a random model a repeated entry is a mistake, but not one that only these few images make a repetition
    return not subject.is_random or spec.max_images != before.max_images


def _named_apart(specs: Sequence[AttackSpec], measure: Measure) -> list[AttackSpec]:
    """The attacks, with names that differ; ValueError where they do not.

    A number of images that there are not more of is in no name, unless it alone tells two attacks apart: a list of
    attacks that many images allow is allowed by a few.
    """
    count = Counter(map(measure.name_of, specs))
    named = [
        dataclasses.replace(spec, label=row_name(spec, measure.context)) if count[measure.name_of(spec)] > 1 else spec
        for spec in specs
    ]
    double = [label for label, times in Counter(map(measure.name_of, named)).items() if times > 1]
    if double:
        raise ValueError(f"attacks need labels of their own, these share one: {', '.join(double)}")
    return named


def _on_all(spec: AttackSpec, subject: Subject) -> AttackSpec:
    """The attack without a number of images that there are not more of."""
    every = spec.max_images is not None and spec.max_images >= len(subject.y)
    return dataclasses.replace(spec, max_images=None) if every else spec


def _impossible(spec: AttackSpec, subject: Subject) -> str | None:
    """Why a model cannot be attacked so, if it cannot."""
    model, attack = subject.model, spec.resolved
    if isinstance(attack, BPDA) and not is_purifier(model):
        return "the model has no purify() and classifier"
    if spec.target == CLASSIFIER and not has_classifier(model):
        return "the model has no classifier"
    if spec.aggregation is not None and not supports(model, SampleLogits):
        return "the model has no sample_logits()"
    if not subject.is_random:
        rand = isinstance(attack, AutoAttack) and attack.version == "rand"
        return "the model is deterministic" if rand else None
    if spec.variant == "fixed" and not supports(model, FixedNoise):
        return "the model is randomised and has no fixed_noise()"
    if spec.variant == "deterministic" and not supports(model, DeterministicMode):
        return "the model is randomised and has no deterministic()"
    return None


def _nonfinite(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.model}: {row.nonfinite_predictions} of the {row.n * row.n_eval} predictions of {row.attack} name no "
        "class, because of a NaN or an infinity among their logits; they count as wrong"
        for row in rows
        if row.nonfinite_predictions
    ]
