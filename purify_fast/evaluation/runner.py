"""The evaluation: every attack on every image the model classifies, judged by fresh predictions, with gradient health.

A row is one attack. The model is attacked and judged in one of three variants: ``random``, as it is; ``fixed``, under
``model.fixed_noise(seed)``; ``deterministic``, under ``model.deterministic()``. Any callable can be evaluated; those
context managers, and ``sample_logits``, are used where the model has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._fingerprint import digest
from .._version import __version__
from ..attacks import Bpda, GradientHealth, frozen
from ..attacks.bpda import classifier_of
from ..defences.aggregation import Head
from ..ops.apgd_step import NORMS as APGD_NORMS
from ..ops.pgd_step import NORMS
from .autoattack import implementation
from .images import collect
from .kinds import Context, run_autoattack, run_batch, settings_of, total
from .labels import ALONE, ball_name, clean_name, row_name, threat_name
from .report import Report
from .row_cache import RowCache
from .rows import Examples, Row
from .specs import CLASSIFIER, Attack, default_attacks
from .subject import Model, Subject, Variant, device_of
from .watched import progress_bar, watched
from .worst import worst

EXAMPLES = 8  # attacked images kept per row, for the pictures


def evaluate(
    defence: Model,
    x: Tensor | Iterable[Any],
    y: Tensor | None = None,
    *,
    eps: float,
    norm: str = "linf",
    base: Model | None = None,
    attacks: Sequence[Attack] | None = None,
    steps: int = 100,
    eot: int = 5,
    n_eval: int = 5,
    batch_size: int = 250,
    chunk: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    name: str = "defence",
    dataset_name: str | None = None,
    progress: bool = True,
) -> Report:
    """Attack a model in every way asked for, and report what it withstands.

    Args:
        defence: images ``[B, C, H, W]`` float32 in [0, 1] to logits ``[B, classes]``; any callable. A module's mode,
            ``requires_grad`` flags and weights, and the random generators, are afterwards as they were.
        x: images ``[N, C, H, W]``, uint8 or float32 in [0, 1]; or, without ``y``, a DataLoader or any other iterable of
            batches (images, labels) or (images, labels, indices), which is read once and kept in memory.
        y: labels, int64 ``[N]``.
        eps: radius of the ball, in image units.
        norm: of the ball: ``linf``, ``l2`` or ``l1`` (no ``apgd`` but AutoAttack's).
        base: an undefended classifier: its adversarial images are tried on the defence.
        attacks: what to run; `default_attacks` if None. Variants the defence lacks are left out, with a note.
        steps: of PGD and APGD where an attack does not say.
        eot: draws per step where an attack does not say; a deterministic model is attacked with one draw.
        n_eval: independent predictions on each adversarial image; 1 for a deterministic model.
        batch_size: images attacked together.
        chunk: images in one forward pass of PGD and APGD at most (exact).
        seed: of everything random.
        out: a folder; each finished row is kept in ``out/rows`` and used again where settings, weights and data agree.
            Rows of models without weights to compare (plain callables) are made anew.
        name: of the model, in the report.
        dataset_name: of the data set, for the report's title.
        progress: whether to show a bar for each attack: forward passes of single images.

    Returns:
        A `Report`: a clean row per variant, a row per attack, and rows named ``worst``: per image, over all attacks by
        PGD, APGD, FGSM and BPDA, other than on a ``target`` (transfer, the classifier alone), of the variant
        ("worst, ...") and over both; a row of survivors brings in what fell before it. Of any other threat model with
        several attacks, a ``worst`` of its own.

    Raises:
        ValueError: a wrong shape, dtype, range or setting.
        TypeError: images or labels that are no tensors, or an attack that is none.
        ModuleNotFoundError: AutoAttack is asked for and missing.
    """
    images, labels = collect(x, y)
    _check_settings(eps, norm, {"steps": steps, "eot": eot, "n_eval": n_eval, "batch_size": batch_size, "chunk": chunk})
    plan = default_attacks(base) if attacks is None else _checked_plan(attacks, norm)
    report = Report(about={"threat": ball_name(norm, eps), "version": f"purify_fast {__version__}"})
    if dataset_name is not None:
        report.about["dataset"] = dataset_name
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda_devices(defence, images)))
        stack.enter_context(torch.no_grad())
        for model in {id(m): m for m in (defence, base, *(a.target for a in plan)) if callable(m)}.values():
            stack.enter_context(frozen(model))
        subject = Subject(defence, images, labels, batch_size=batch_size, n_eval=n_eval, seed=seed)
        context = Context(float(eps), norm, steps, eot, batch_size, chunk, seed, subject.num_classes)
        rows = _Rows(subject, context, None if out is None else RowCache(Path(out)), name, progress)
        possible = _possible(plan, subject, context, report.notes, name)
        variants: list[Variant] = list(dict.fromkeys(attack.variant for attack in possible)) or ["random"]
        for variant in variants:
            report.rows.append(rows.clean(variant))
        # an attack spares nothing that fell to another threat model
        left: dict[tuple[str, str | None], np.ndarray] = {}
        for attack in possible:
            where = attack.variant, threat_name(attack, context)
            before = left.get(where, rows.clean(attack.variant).robust)
            row = rows.attacked(attack, before)
            report.rows.append(row)
            left[where] = before.copy()
            left[where][: row.n] &= row.robust
    report.rows += worst(report.rows)
    report.notes += _nonfinite(report.rows)
    return report


def _check_settings(eps: float, norm: str, counts: dict[str, int | None]) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    for setting, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}")


def _checked_plan(attacks: Sequence[Attack], norm: str) -> list[Attack]:
    if isinstance(attacks, (str, Attack)) or not isinstance(attacks, Iterable):
        raise TypeError(f"attacks must be a list of attacks, got {attacks!r}")
    for attack in attacks:
        if not isinstance(attack, Attack):
            raise TypeError(f"an attack must be a purify_fast.evaluation.Attack, got {attack!r}")
    if norm not in APGD_NORMS and any(attack.kind == "apgd" and attack.norm is None for attack in attacks):
        raise ValueError(f"apgd's norm must be one of {', '.join(APGD_NORMS)}, got {norm!r}: leave it out, or name one")
    if any(attack.kind == "autoattack" for attack in attacks):
        implementation()
    return list(attacks)


def _cuda_devices(defence: Model, x: Tensor) -> list[int]:
    device = device_of(defence, x)
    return [device.index or 0] if device.type == "cuda" else []


def _possible(plan: list[Attack], subject: Subject, context: Context, notes: list[str], name: str) -> list[Attack]:
    """The attacks this model allows; for a deterministic one, ``random`` and ``fixed`` are the model as it is."""
    kept: list[Attack] = []
    for attack in plan:
        label = row_name(attack, context)
        why = _impossible(attack, subject)
        if why is None and not subject.is_random:
            attack = dataclasses.replace(attack, variant="random")
            if row_name(attack, context) in {row_name(other, context) for other in kept}:
                continue  # the same model under the same attack again
        if why is None:
            kept.append(attack)
        else:
            notes.append(f"{name}: {label} was left out: {why}")
    labels = [row_name(attack, context) for attack in kept]
    double = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if double:
        raise ValueError(f"attacks need labels of their own, these share one: {', '.join(double)}")
    return kept


def _impossible(attack: Attack, subject: Subject) -> str | None:
    """Why a model cannot be attacked so, if it cannot."""
    model = subject.model
    if attack.kind == "bpda" and not (hasattr(model, "purify") and hasattr(model, "classifier")):
        return "the model has no purify() and classifier"
    if attack.target == CLASSIFIER and not hasattr(model, "classifier"):
        return "the model has no classifier"
    if attack.kind != "bpda" and attack.head is not None and not hasattr(model, "sample_logits"):
        return "the model has no sample_logits()"
    if not subject.is_random:
        rand = attack.kind == "autoattack" and attack.version == "rand"
        return "the model is deterministic" if rand else None
    if attack.variant == "fixed" and not hasattr(model, "fixed_noise"):
        return "the model is randomised and has no fixed_noise()"
    if attack.variant == "deterministic" and not hasattr(model, "deterministic"):
        return "the model is randomised and has no deterministic()"
    return None


def _nonfinite(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.model}: {row.nonfinite_predictions} of the {row.n * row.n_eval} predictions of {row.attack} have a NaN "
        "among their logits; they count as wrong"
        for row in rows
        if row.nonfinite_predictions
    ]


class _Rows:
    """Makes the rows of one call of `evaluate`, or finds them again.

    Args:
        subject: what is attacked.
        context: what the attacks take from the call.
        cache: where finished rows are kept, if they are.
        name: of the model.
        progress: whether to show bars.
    """

    def __init__(self, subject: Subject, context: Context, cache: RowCache | None, name: str, progress: bool):
        self.subject, self.context, self.cache = subject, context, cache
        self.name, self.progress = name, progress
        self._clean: dict[str, Row] = {}

    def clean(self, variant: Variant) -> Row:
        """Accuracy on the clean images."""
        if variant not in self._clean:
            settings = {"clean": variant, "n_eval": self.subject.judges(variant)}
            self._clean[variant] = self._kept(settings, None, lambda: self._measure_clean(variant))
        return self._clean[variant]

    def attacked(self, attack: Attack, left: np.ndarray) -> Row:
        """One attack's row; ``left`` is what earlier attacks on the variant left right."""
        alive = (left if attack.survivors else self.clean(attack.variant).robust)[: attack.limit]
        settings = settings_of(attack, self.context) | {"n_eval": self.subject.judges(attack.variant)}
        target = attack.target
        settings["target"] = "defence" if target is None else ALONE if target == CLASSIFIER else type(target).__name__
        settings |= {"attacked": int(alive.sum()), "survivors": attack.survivors}
        decides = settings | {"alive": digest(torch.from_numpy(alive))}
        other = None if isinstance(target, str) else target
        row = self._kept(decides, other, lambda: self._measure_attack(attack, alive, settings))
        # no part of the key: the same attack by any name
        row.attack, row.threat = row_name(attack, self.context), threat_name(attack, self.context)
        return row

    def _kept(self, settings: dict[str, Any], target: Model | None, make) -> Row:
        """The row of these settings, from the cache if it has it."""
        if self.cache is None:
            return make()
        subject, context = self.subject, self.context
        # they decide which image gets which draws
        batches = [context.batch_size, context.chunk] if subject.is_random else []
        what = {"settings": settings, "data": subject.data, "seed": subject.seed, "batches": batches}
        what["num_classes"] = subject.num_classes
        row = self.cache.row(self.cache.key(what, subject.model, target), make)
        # the name is no part of the key
        row.model = self.name
        return row

    def _measure_clean(self, variant: Variant) -> Row:
        begin = time.perf_counter()
        judged = self.subject.judge(self.subject.x, variant, "clean")
        seconds = time.perf_counter() - begin
        common = self._common(judged.right, judged.nonfinite)
        return Row(
            attack=clean_name(variant), kind="clean", variant=variant, robust=judged.right[0], seconds=seconds, **common
        )

    def _common(self, right: np.ndarray, nonfinite: int) -> dict[str, Any]:
        """What every row says of the model's predictions."""
        return {
            "model": self.name,
            "mean": float(right.mean()),
            "worst": float(right.all(0).mean()),
            "n_eval": len(right),
            "seed": self.subject.seed,
            "data": self.subject.data,
            "nonfinite_predictions": nonfinite,
        }

    def _measure_attack(self, attack: Attack, alive: np.ndarray, settings: dict[str, Any]) -> Row:
        begin = time.perf_counter()
        subject, label = self.subject, row_name(attack, self.context)
        index = torch.from_numpy(alive).nonzero()[:, 0]
        x = subject.x[: len(alive)]
        health, adversarial = GradientHealth(), x.clone()
        subject.reseed("attack")
        target = self._target(attack)
        with subject.variant(attack.variant), frozen(target):
            draws = settings["eot"] = self._draws(attack, target)
            context = dataclasses.replace(self.context, eot=draws)
            with progress_bar(f"{self.name}: {label}", self.progress, total(attack, context, draws, len(index))) as bar:
                settings |= self._run(attack, watched(target, bar), index, adversarial, context, health)
        judged = subject.judge(adversarial, attack.variant, "judge")
        # what was not attacked counts as lost
        right = judged.right & alive
        counts = {what: health.count(what) for what in ("gradients", "nonfinite", "zero", "images", "unmoved")}
        return Row(
            attack=label, kind=attack.kind, variant=attack.variant, robust=right.all(0),
            seconds=time.perf_counter() - begin, health=counts if counts["gradients"] else None,
            reliable=health.reliable, settings=settings, examples=_examples(x, adversarial, subject.y, index),
            **self._common(right, judged.nonfinite),
        )  # fmt: skip

    def _target(self, attack: Attack) -> Model:
        model = self.subject.model
        if attack.kind == "bpda":
            return Bpda.of(model, attack.head)
        if attack.head is not None:
            return Head(model, attack.head)
        if isinstance(attack.target, str):
            return classifier_of(model)
        return model if attack.target is None else attack.target

    def _draws(self, attack: Attack, target: Model) -> int:
        """EOT draws: one if the target does not draw. Within the variant's block."""
        subject = self.subject
        asked = attack.eot or (20 if attack.kind == "autoattack" else self.context.eot)
        # a head that is infinite everywhere hides the draws behind it
        hidden = subject.is_random and attack.variant == "random" and not target(subject.some()).isfinite().all()
        return asked if hidden or subject.draws(target) else 1

    def _run(self, attack, model, index, adversarial, context, health) -> dict[str, Any]:
        """Attack the images of ``index``, put what is found into ``adversarial``; returns more settings."""
        subject = self.subject
        if attack.kind == "autoattack":
            if len(index) == 0:
                return {}
            x, y = subject.x[index].to(subject.device), subject.y[index].to(subject.device)
            found, warnings = run_autoattack(attack, model, x, y, context=context, health=health)
            adversarial[index] = found.to(adversarial.device)
            return {"warnings": warnings}
        for part in index.split(context.batch_size):
            x, y, ids = (t.to(subject.device) for t in (subject.x[part], subject.y[part], part))
            found = run_batch(attack, model, x, y, ids, context=context, health=health)
            adversarial[part] = found.to(adversarial.device)
        return {}


def _examples(x: Tensor, adversarial: Tensor, y: Tensor, index: Tensor) -> Examples | None:
    index = index[:EXAMPLES]
    if len(index) == 0:
        return None
    return Examples(x[index].cpu().numpy(), adversarial[index].cpu().numpy(), y[index.to(y.device)].cpu().numpy())
