"""The evaluation: every attack on every image the model classifies, judged by fresh predictions, with gradient health.

A row is one attack. The model is attacked and judged in one of three variants: ``random``, as it is; ``fixed``, under
``model.fixed_noise(seed)``; ``deterministic``, under ``model.deterministic()``. Any callable can be evaluated; those
context managers, and ``sample_logits``, are used where the model has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._files import atomic, digest, write_text
from ..attacks import LOSSES, TARGETED, BpdaModel, GradientHealth, apgd, fgsm, frozen, input_gradient, pgd, stadv
from ..attacks.arguments import read_norm
from ..attacks.autoattack import Version, autoattack, implementation, parts
from ..attacks.bpda import classifier_of
from ..attacks.stadv import EPS as FLOW
from ..defences.aggregation import Head
from ..ops.aggregate import METHODS, UNSAFE
from ..ops.apgd_step import NORMS as APGD_NORMS
from ..ops.pgd_step import NORMS
from ..protocols import SharesDraws, supports
from .report import FORMAT, Examples, Report, Row

Model = Callable[[Tensor], Tensor]
KINDS = ("pgd", "apgd", "fgsm", "bpda", "stadv", "autoattack")
GRADIENT = ("pgd", "apgd", "fgsm", "bpda", "stadv")  # ours
VARIANTS = ("random", "fixed", "deterministic")
CLASSIFIER = "classifier"  # as a target
LEE_KIM = "PGD-200 ce + EOT (Lee & Kim 2023)"
_ALONE = "on the classifier alone (not adaptive)"
_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}
_OPTIONS = {  # of `Attack`, and the kinds they are of
    "steps": ("pgd", "apgd", "bpda", "stadv", "autoattack"),
    "alpha": ("pgd", "bpda", "stadv"),
    "start": ("pgd", "bpda"),
    "restarts": ("pgd", "apgd", "bpda", "stadv"),
    "smoothness": ("stadv",),
    "norm": ("pgd", "apgd", "fgsm", "bpda", "autoattack"),
    "targets": ("apgd",),
    "version": ("autoattack",),
    "queries": ("autoattack",),
}
EXAMPLES = 8  # attacked images kept per row, for the pictures
_CLEAN, _ATTACK, _JUDGE = range(3)  # each phase has a seed of its own: no attack has seen the draws it is judged by


@dataclass(frozen=True)
class Attack:
    """One attack; what is None is taken from `evaluate`'s arguments.

    Attributes:
        kind: ``pgd``, ``apgd``, ``fgsm``, ``bpda`` (PGD on `purify_fast.attacks.BpdaModel` of a defence with
            ``purify(x)`` and ``classifier``), ``stadv`` or ``autoattack``.
        loss: of all but AutoAttack: ``ce``, ``margin`` or ``dlr``, of APGD also ``dlr_targeted``; ``margin`` instead
            of ``dlr`` below 3 classes, of ``dlr_targeted`` below 4. None: ``ce``, of StAdv ``margin``.
        steps: of all but FGSM; of AutoAttack's APGD and FAB (None: 100). eot: draws per step (AutoAttack, None: 20).
        variant: which model is attacked and judged: ``random``, ``fixed`` or ``deterministic``.
        version: of AutoAttack: ``standard`` or ``rand``. queries: of its Square.
        target: attack this model instead, judge the defence: a transfer attack, or another head of the defence.
            ``"classifier"``: the defence's own, alone; the row's name says how little that shows.
        head: attack ``aggregate(defence.sample_logits(x), head)`` instead, judge the defence; of BPDA, how the logits
            of several draws are aggregated (None: the defence's own).
        label: the row's name; made from the rest if None. Another threat model or ``"classifier"`` is named after it.
        alpha: PGD's and BPDA's step in image units; StAdv's rate. start: whether PGD and BPDA begin at a random point.
        restarts: runs, but for AutoAttack and FGSM, of which each image keeps its worst; StAdv's first is without a
            flow, the others begin with random ones.
        targets: of ``dlr_targeted``: so many wrong classes, or all where there are fewer; a run for each.
        smoothness: of StAdv, its tau.
        eps, norm: another ball than the report's (``apgd``: ``linf`` or ``l2``); of StAdv, eps is the bound on the flow
            (None: 0.05). Such a row carries its threat model in its name and enters no headline and no ``worst`` but
            its own.
        limit: attack only the first so many images.
        survivors: attack only what the attacks before it, on this variant, left right; the row counts every image, as
            left after all of them. Cheap attacks first then save most of a costly one's work.
    """

    kind: str = "pgd"
    loss: str | None = None
    steps: int | None = None
    eot: int | None = None
    variant: str = "random"
    version: str = "standard"
    queries: int = 5000
    target: Model | str | None = None
    head: str | None = None
    label: str | None = None
    alpha: float | None = None
    restarts: int = 1
    targets: int = 9
    limit: int | None = None
    survivors: bool = False
    start: bool = True
    smoothness: float | None = None
    eps: float | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        losses = (None, *LOSSES, *(TARGETED if self.kind == "apgd" else ()))
        norms = (None, *(APGD_NORMS if self.kind == "apgd" else NORMS))
        names = {"kind": KINDS, "loss": losses, "variant": VARIANTS, "version": get_args(Version), "norm": norms}
        for name, allowed in names.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(filter(None, allowed))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for option, kinds in _OPTIONS.items():
            if self.kind not in kinds and getattr(self, option) != getattr(Attack, option):
                raise ValueError(f"{option} goes with {', '.join(kinds)}, not with {self.kind}")
        if self.head not in (None, *METHODS, *UNSAFE):
            raise ValueError(f"head must be one of {', '.join(METHODS + UNSAFE)}, got {self.head!r}")
        if self.head is not None and self.target is not None:
            raise ValueError("an attack has a target or a head, not both")
        if isinstance(self.target, str) and self.target != CLASSIFIER:
            raise ValueError(f"target must be a model or {CLASSIFIER!r}, got {self.target!r}")
        if self.kind == "bpda" and self.target is not None:
            raise ValueError("bpda attacks the defence's own purifier: it takes no target")
        if self.norm is not None and self.eps is None:
            raise ValueError(f"the norm {self.norm} needs an eps of its own")
        for name in ("steps", "eot", "queries", "restarts", "targets", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("alpha", "smoothness", "eps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")


def default_attacks(base: Model | None = None) -> list[Attack]:
    """PGD with CE and DLR on the randomised and the deterministic model, BPDA, AutoAttack, transfer from ``base``."""
    own = [Attack(loss=loss, variant=variant) for variant in ("random", "deterministic") for loss in ("ce", "dlr")]
    auto = [Attack("autoattack", variant="fixed"), Attack("autoattack", version="rand")]
    transfer = [] if base is None else [Attack(target=base, label="transfer from the base")]
    return [*own, Attack("bpda"), *auto, *transfer]


def lee_kim_2023(eps: float = 8 / 255) -> Attack:
    """PGD + EOT of Lee & Kim, "Robust evaluation of diffusion-based adversarial purification", ICCV 2023.

    Full gradient, 200 steps of 0.007 at eps = 8/255, of the same share of any other eps, 20 draws averaged before the
    sign is taken, L-inf, no random start. Ours: of the iterates the best is kept, not the last.
    """
    alpha = 0.007 * eps / (8 / 255)
    return Attack(loss="ce", steps=200, alpha=alpha, eot=20, start=False, eps=eps, norm="linf", label=LEE_KIM)


def evaluate(
    defence: Model,
    x: Tensor,
    y: Tensor,
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
    progress: bool = True,
) -> Report:
    """Attack a model in every way asked for, and report what it withstands.

    Args:
        defence: images ``[B, C, H, W]`` float32 in [0, 1] to logits ``[B, classes]``; any callable. A module's mode,
            ``requires_grad`` flags and weights, and the random generators, are afterwards as they were.
        x, y: images, uint8 or float32 in [0, 1], and int64 labels ``[N]``.
        eps, norm: the ball, in image units; ``linf``, ``l2`` or ``l1`` (no ``apgd`` but AutoAttack's).
        base: an undefended classifier: its adversarial images are tried on the defence.
        attacks: what to run; default `default_attacks`. Variants the defence lacks are left out, with a note.
        steps, eot: of PGD and APGD where an attack does not say; a deterministic model is attacked with one draw.
        n_eval: independent predictions on each adversarial image; 1 for a deterministic model.
        batch_size: images attacked together. chunk: images in one forward pass of PGD and APGD at most (exact).
        seed: of everything random.
        out: a folder; each finished row is kept in ``out/rows`` and used again where settings, weights and data agree.
            Rows of models without weights to compare (plain callables) are made anew.
        name: of the model, in the report.
        progress: whether to show a bar for each attack: forward passes of single images.

    Returns:
        A `Report`: a clean row per variant, a row per attack, and rows named ``worst``: per image, over all attacks by
        PGD, APGD, FGSM and BPDA, other than on a ``target`` (transfer, the classifier alone), of the variant
        ("worst, ...") and over both; a row of survivors brings in what fell before it. Of any other threat model with
        several attacks, a ``worst`` of its own.

    Raises:
        ValueError: a wrong shape, dtype, range or setting. ModuleNotFoundError: AutoAttack is asked for and missing.
    """
    x = _checked(x, y, eps, norm, steps, eot, n_eval, batch_size, chunk)
    device = _device(defence, x)
    plan = default_attacks(base) if attacks is None else list(attacks)
    if norm not in APGD_NORMS and any(attack.kind == "apgd" and attack.norm is None for attack in plan):
        raise ValueError(f"apgd's norm must be one of {', '.join(APGD_NORMS)}, got {norm!r}: leave it out, or name one")
    if any(attack.kind == "autoattack" for attack in plan):
        implementation()
    devices = [device.index or 0] if device.type == "cuda" else []
    report = Report()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        for model in {id(m): m for m in (defence, base, *(a.target for a in plan)) if callable(m)}.values():
            stack.enter_context(frozen(model))
        run = _Run(
            defence, x, y, eps, norm, steps, eot, n_eval, batch_size, chunk, seed, name, progress, device,
            None if out is None else _Store(Path(out)),
        )  # fmt: skip
        plan = _possible(plan, run, report.notes)
        for variant in dict.fromkeys(attack.variant for attack in plan) or ["random"]:
            report.rows.append(run.clean(variant))
        left: dict[tuple[str, str | None], np.ndarray] = {}  # an attack spares nothing that fell to another threat
        for attack in plan:
            where = attack.variant, run.threat(attack)
            before = left.get(where, run.clean(attack.variant).robust)
            row = run.attack(attack, before)
            report.rows.append(row)
            left[where] = before.copy()
            left[where][: row.n] &= row.robust
    report.rows += worst(report.rows)
    return report


def _checked(
    x: Tensor, y: Tensor, eps: float, norm: str, steps: int, eot: int, n_eval: int, batch_size: int, chunk: int | None
) -> Tensor:
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 [N] = [{len(x)}], got {y.dtype} {list(y.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    counts = {"steps": steps, "eot": eot, "n_eval": n_eval, "batch_size": batch_size, "chunk": chunk}
    for setting, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{setting} must be at least 1, got {value}")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if x.dtype != torch.float32:
        raise ValueError(f"x must be uint8 or float32, got {x.dtype}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("x must be in [0, 1] and free of NaN")
    return x.detach()


def _device(model: Model, x: Tensor) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return x.device


def _possible(plan: list[Attack], run: _Run, notes: list[str]) -> list[Attack]:
    """The attacks this defence allows; for a deterministic one, ``random`` and ``fixed`` are the model as it is."""
    kept: list[Attack] = []
    for attack in plan:
        why = None
        if attack.kind == "bpda" and not (hasattr(run.defence, "purify") and hasattr(run.defence, "classifier")):
            why = "the model has no purify() and classifier"
        elif attack.target == CLASSIFIER and not hasattr(run.defence, "classifier"):
            why = "the model has no classifier"
        elif attack.kind != "bpda" and attack.head is not None and not hasattr(run.defence, "sample_logits"):
            why = "the model has no sample_logits()"
        elif not run.randomised:
            if attack.kind == "autoattack" and attack.version == "rand":
                notes.append(f"{run.name}: {run.label(attack)} was left out: the model is deterministic")
                continue
            attack = dataclasses.replace(attack, variant="random")
            if run.label(attack) in {run.label(other) for other in kept}:
                continue  # the same model under the same attack again
        elif attack.variant == "fixed" and not hasattr(run.defence, "fixed_noise"):
            why = "the model is randomised and has no fixed_noise()"
        elif attack.variant == "deterministic" and not hasattr(run.defence, "deterministic"):
            why = "the model is randomised and has no deterministic()"
        if why is None:
            kept.append(attack)
        else:
            notes.append(f"{run.name}: {run.label(attack)} was left out: {why}")
    labels = [run.label(attack) for attack in kept]
    double = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if double:
        raise ValueError(f"attacks need labels of their own, these share one: {', '.join(double)}")
    return kept


class _Run:
    """One call of `evaluate`."""

    def __init__(
        self, defence, x, y, eps, norm, steps, eot, n_eval, batch_size, chunk, seed, name, progress, device, store
    ):  # fmt: skip
        self.defence, self.x, self.y, self.eps, self.norm = defence, x, y, float(eps), norm
        self.steps, self.eot, self.n_eval, self.batch_size, self.chunk = steps, eot, n_eval, batch_size, chunk
        self.seed, self.name, self.progress, self.device, self.store = seed, name, progress, device, store
        self.data = digest(x, y)
        self.fingerprints: dict[int, str | None] = {}
        self._clean: dict[str, Row] = {}
        torch.manual_seed(seed)
        self.randomised = self.is_random(defence)
        self.classes = defence(x[:1].to(device)).shape[1]
        bad = (y < 0) | (y >= self.classes)
        if bool(bad.any()):
            first = int(bad.int().argmax())
            raise ValueError(f"y[{first}] is {int(y[first])}, but the model has {self.classes} classes")

    def is_random(self, model: Model) -> bool:
        """Whether two predictions differ."""
        some = self.x[:8].to(self.device)
        return not torch.allclose(model(some), model(some), rtol=1e-5, atol=1e-6, equal_nan=True)

    def variant(self, name: str) -> contextlib.AbstractContextManager:
        """The defence as the variant has it, within a block."""
        if name == "random" or not self.randomised:
            return contextlib.nullcontext()
        return self.defence.fixed_noise(self.seed) if name == "fixed" else self.defence.deterministic()

    def draws(self, variant: str) -> int:
        """Predictions that judge an image."""
        return self.n_eval if variant == "random" and self.randomised else 1

    def reseed(self, phase: int) -> None:
        torch.manual_seed(3 * self.seed + phase)

    def loss(self, attack: Attack) -> str:
        asked = attack.loss or ("margin" if attack.kind == "stadv" else "ce")
        return "margin" if self.classes < {"dlr": 3, "dlr_targeted": 4}.get(asked, 2) else asked

    def ball(self, attack: Attack) -> tuple[str, float]:
        """Norm and radius."""
        if attack.kind == "stadv":
            return "flow", FLOW if attack.eps is None else float(attack.eps)
        return attack.norm or self.norm, self.eps if attack.eps is None else float(attack.eps)

    def threat(self, attack: Attack) -> str | None:
        """The attack's threat model in words, None where it is the report's."""
        norm, eps = self.ball(attack)
        if norm == self.norm and math.isclose(eps, self.eps, rel_tol=1e-6):
            return None
        return f"{_NORMS[norm]} {_short(eps)}"

    def runs(self, attack: Attack) -> int:
        """How often an image is attacked at most: restarts, for each target."""
        return attack.restarts * (min(attack.targets, self.classes - 1) if self.loss(attack) in TARGETED else 1)

    def target(self, attack: Attack) -> Model:
        if attack.kind == "bpda":
            return BpdaModel.of(self.defence, attack.head)
        if attack.head is not None:
            return Head(self.defence, attack.head)
        if isinstance(attack.target, str):
            return classifier_of(self.defence)
        return self.defence if attack.target is None else attack.target

    def target_draws(self, attack: Attack, target: Model) -> int:
        """EOT draws: one if the target does not draw. Within the variant's block."""
        asked = attack.eot or (20 if attack.kind == "autoattack" else self.eot)
        # a head that is infinite everywhere hides the draws behind it
        hidden = (
            self.randomised and attack.variant == "random" and not target(self.x[:8].to(self.device)).isfinite().all()
        )
        return asked if hidden or self.is_random(target) else 1

    def label(self, attack: Attack) -> str:
        """The row's name, the same for a randomised model and a deterministic one, so that they stand side by side."""
        name = self._label(attack) if attack.label is None else attack.label
        alone = f" {_ALONE}" if attack.target == CLASSIFIER and _ALONE not in name else ""
        threat = self.threat(attack)
        return name + alone + (f", {threat}" if threat is not None and threat not in name else "")

    def _label(self, attack: Attack) -> str:
        some = f", first {attack.limit}" if attack.limit is not None else ""
        if attack.kind == "autoattack":
            name = f"AutoAttack {attack.version}"
            steps = f", {attack.steps} steps" if attack.steps not in (None, 100) else ""
            steps += f", {attack.queries} queries" if attack.version == "standard" and attack.queries != 5000 else ""
            run, replaced = parts(attack.version, self.classes)
            if replaced is not None:
                steps += f" ({' + '.join(run)}; PGD margin for {replaced}: {self.classes} classes)"
            name += steps
        else:
            loss, count = self.loss(attack), attack.steps or self.steps
            kind = "StAdv" if attack.kind == "stadv" else attack.kind.upper()
            name = f"FGSM {loss}" if attack.kind == "fgsm" else f"{kind}-{count} {loss}"
            if loss in TARGETED:
                name = f"APGD-T {count}" + (f", {attack.targets} targets" if attack.targets != 9 else "")
            name += f" x{attack.restarts}" if attack.restarts > 1 else ""
        if attack.head is not None:
            name += f" through {attack.head}"
        if attack.target is not None:
            name += f" {_ALONE}" if attack.target == CLASSIFIER else " on another model"
        standard = attack.kind == "autoattack" and attack.version == "standard"  # needs a deterministic model anyway
        if attack.variant == "deterministic" or (attack.variant == "fixed" and not standard):
            name += {"fixed": ", fixed noise", "deterministic": ", deterministic"}[attack.variant]
        return name + some

    def clean(self, variant: str) -> Row:
        """Accuracy on the clean images."""
        label = "clean" if variant == "random" else f"clean, {'fixed noise' if variant == 'fixed' else variant}"
        if variant not in self._clean:
            key = self.key({"clean": variant, "n_eval": self.draws(variant)}, [self.defence])
            self._clean[variant] = self.stored(key, lambda: self._measure_clean(label, variant))
        return self._clean[variant]

    def _measure_clean(self, label: str, variant: str) -> Row:
        begin = time.perf_counter()
        right = self.predictions(self.x, self.y, variant, _CLEAN)
        return self.row(label, "clean", variant, right[0], right, time.perf_counter() - begin)

    def predictions(self, x: Tensor, y: Tensor, variant: str, phase: int) -> np.ndarray:
        """bool [draws, n]: which predictions were right."""
        self.reseed(phase)
        rows = []
        with self.variant(variant):
            for _ in range(self.draws(variant)):
                parts = [self.defence(a.to(self.device)).argmax(1).cpu() for a in x.split(self.batch_size)]
                rows.append((torch.cat(parts) == y.cpu()).numpy())
        return np.stack(rows)

    def row(self, label: str, kind: str, variant: str, robust: np.ndarray, right: np.ndarray, seconds: float, **more):
        return Row(
            self.name, label, kind, variant, robust, float(right.mean()), float(right.all(0).mean()), len(right),
            self.seed, seconds, self.data, **more,
        )  # fmt: skip

    def attack(self, attack: Attack, left: np.ndarray) -> Row:
        """One attack's row; ``left`` is what earlier attacks on the variant left right."""
        alive = left if attack.survivors else self.clean(attack.variant).robust
        alive = alive[: attack.limit]
        label = self.label(attack)
        settings = self.settings(attack) | {"attacked": int(alive.sum()), "survivors": attack.survivors}
        target = None if isinstance(attack.target, str) else attack.target
        key = self.key(settings | {"alive": digest(torch.from_numpy(alive))}, [self.defence, target])
        row = self.stored(key, lambda: self._measure_attack(attack, label, alive, settings))
        row.attack, row.threat = label, self.threat(attack)  # no part of the key: the same attack by any name
        return row

    def _measure_attack(self, attack: Attack, label: str, alive: np.ndarray, settings: dict[str, Any]) -> Row:
        begin = time.perf_counter()
        n = len(alive)
        x, y, index = self.x[:n], self.y[:n], torch.from_numpy(alive).nonzero()[:, 0]
        self.reseed(_ATTACK)
        health = GradientHealth()
        adversarial = x.clone()
        target = self.target(attack)
        with self.variant(attack.variant), frozen(target):
            draws = self.target_draws(attack, target)
            settings["eot"] = draws
            with _bar(f"{self.name}: {label}", self.progress, self.total(attack, draws, len(index))) as bar:
                watched = _watched(target, bar)
                work = self._autoattack if attack.kind == "autoattack" else self._gradient
                work(attack, watched, index, adversarial, draws, health, settings)
        right = self.predictions(adversarial, y, attack.variant, _JUDGE) & alive  # what was not attacked counts as lost
        counts = {what: health.count(what) for what in ("gradients", "nonfinite", "zero", "images", "unmoved")}
        return self.row(
            label, attack.kind, attack.variant, right.all(0), right, time.perf_counter() - begin,
            health=counts if counts["gradients"] else None, reliable=health.reliable, settings=settings,
            examples=_examples(x, adversarial, y, index),
        )  # fmt: skip

    def _gradient(self, attack, target, index, adversarial, draws, health, settings) -> None:
        """Our attacks, batch by batch; noise is tied to the image's index, so that batches do not matter."""
        norm, eps = self.ball(attack)
        steps = attack.steps or self.steps
        common: dict[str, Any] = {
            "eps": eps, "loss": self.loss(attack), "eot_iter": draws, "max_forward_batch": self.chunk, "health": health,
        }  # fmt: skip
        if attack.kind != "fgsm":
            common["steps"] = steps
        if attack.kind != "stadv":
            common["norm"] = norm
        for part in index.split(self.batch_size):
            x, y, ids = self.x[part].to(self.device), self.y[part].to(self.device), part.to(self.device)
            if attack.kind == "fgsm":
                best = fgsm(target, x, y, **common)
            elif attack.kind == "apgd":
                best = apgd(
                    target, x, y, restarts=attack.restarts, n_target_classes=attack.targets, seed=self.seed,
                    sample_ids=ids, **common,
                )  # fmt: skip
            else:
                best = self._worst_of_restarts(attack, target, x, y, ids, draws, common)
            adversarial[part] = best.to(adversarial.device)

    def _worst_of_restarts(self, attack, target, x, y, ids, draws, common) -> Tensor:
        best, value = x, torch.full((len(x),), -torch.inf, device=self.device)
        for restart in range(attack.restarts):
            own = {"keep_best": True, "seed": self.seed + restart, "sample_ids": ids}
            if attack.kind == "stadv":
                given = {"rate": attack.alpha, "smoothness": attack.smoothness}
                own |= {name: setting for name, setting in given.items() if setting is not None}
                found = stadv(target, x, y, random_start=restart > 0, **own, **common)
            else:
                found = pgd(target, x, y, alpha=attack.alpha, random_start=attack.start or restart > 0, **own, **common)
            if attack.restarts == 1:
                return found
            new = sum(LOSSES["margin"](target(found), y) for _ in range(draws)) / draws
            better = new > value
            best = torch.where(better.view(-1, 1, 1, 1), found, best)
            value = torch.where(better, new, value)
        return best

    def _autoattack(self, attack, target, index, adversarial, draws, health, settings) -> None:
        if len(index) == 0:
            return
        x, y = self.x[index].to(self.device), self.y[index].to(self.device)
        norm, eps = self.ball(attack)
        found, said = autoattack(
            target, x, y, eps=eps, norm=read_norm(norm), version=attack.version, num_classes=self.classes,
            seed=self.seed, batch_size=self.batch_size, steps=attack.steps or 100, eot_iter=draws,
            n_queries=attack.queries, max_forward_batch=self.chunk,
        )  # fmt: skip
        settings["warnings"] = said
        for a, b, c in zip(
            x.split(self.batch_size), found.split(self.batch_size), y.split(self.batch_size), strict=True
        ):
            for point in (a, b):
                health.see_gradient(input_gradient(target, point, c)[0])
        adversarial[index] = found.to(adversarial.device)

    def total(self, attack: Attack, draws: int, images: int) -> int | None:
        """Forward passes of single images, for the bar; AutoAttack's are not known before, APGD's at most so many."""
        if attack.kind == "autoattack":
            return None
        steps = 1 if attack.kind == "fgsm" else attack.steps or self.steps
        best = 0 if attack.kind == "fgsm" else draws * (2 if draws > 1 else 1)
        if attack.kind == "apgd":  # runs after the first are for those still robust
            return images * (self.runs(attack) * (steps * draws + best) + 1)
        picks = draws if attack.restarts > 1 else 0
        return images * attack.restarts * (steps * draws + best + picks + 1)

    def settings(self, attack: Attack) -> dict[str, Any]:
        """What was run, in plain values."""
        own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack) if f.name not in ("target", "label")}
        auto = attack.kind == "autoattack"
        own["steps"] = attack.steps or (100 if auto else self.steps)
        own["eot"] = attack.eot or (20 if auto else self.eot)
        if auto:
            run, replaced = parts(attack.version, self.classes)
            own |= {"attacks": run, "replaced_by_pgd_margin": replaced}
        else:
            own["loss"] = self.loss(attack)
            own["targets"] = self.runs(attack) // attack.restarts if own["loss"] in TARGETED else None
        target = attack.target
        own["target"] = "defence" if target is None else _ALONE if target == CLASSIFIER else type(target).__name__
        norm, eps = self.ball(attack)
        return own | {"eps": eps, "norm": norm, "n_eval": self.draws(attack.variant)}

    def key(self, settings: dict[str, Any], models: Sequence[Model | None]) -> str | None:
        """Names a row by all it depends on; None where a model cannot be named."""
        if self.store is None:
            return None
        marks = []
        for model in models:
            if id(model) not in self.fingerprints:
                self.fingerprints[id(model)] = "" if model is None else _fingerprint(model)
            marks.append(self.fingerprints[id(model)])
        if None in marks:
            return None
        batches = [self.batch_size, self.chunk] if self.randomised else []  # they decide who gets which draws
        what = [_code(), settings, marks, self.data, self.seed, self.classes, batches]
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def stored(self, key: str | None, make: Callable[[], Row]) -> Row:
        row = self.store.get(key) if self.store is not None and key is not None else None
        if row is None:
            row = make()
            if self.store is not None and key is not None:
                self.store.put(key, row)
        row.model = self.name  # the name is no part of the key
        return row


def worst(rows: list[Row]) -> list[Row]:
    """Per image, the worst over our attacks on all images, by variant and over all, each threat model by itself.

    Of another threat model than the report's only where it has several rows.
    """
    full = max(row.n for row in rows)
    mine = [r for r in rows if r.kind in GRADIENT and r.n == full and r.settings["target"] == "defence"]
    main = [row for row in mine if row.threat is None]
    variants = list(dict.fromkeys(row.variant for row in main))
    groups = [(f"worst, {variant}", [r for r in main if r.variant == variant]) for variant in variants]
    groups = [*(groups if len(groups) > 1 else []), ("worst", main)]
    for threat in dict.fromkeys(row.threat for row in mine if row.threat is not None):
        group = [row for row in mine if row.threat == threat]
        groups += [(f"worst, {threat}", group)] if len(group) > 1 else []
    made = []
    for label, group in groups:
        if not group:
            continue
        robust = np.logical_and.reduce([row.robust for row in group])
        accuracy = float(robust.mean())
        first, one = group[0], len({row.variant for row in group}) == 1
        made.append(
            Row(
                first.model, label, "worst", first.variant if one and label != "worst" else "all", robust, accuracy,
                accuracy, first.n_eval, first.seed, sum(row.seconds for row in group), first.data,
                # one attack that had gradients is enough: the others can only have lowered the number
                reliable=any(row.reliable and row.settings["attacked"] for row in group),
                settings={"over": [row.attack for row in group]},
                threat=first.threat,
            )
        )  # fmt: skip
    return made


def _short(eps: float) -> str:
    """0.5, 8/255, or a few digits."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"


def _examples(x: Tensor, adversarial: Tensor, y: Tensor, index: Tensor) -> Examples | None:
    index = index[:EXAMPLES]
    if len(index) == 0:
        return None
    return Examples(x[index].cpu().numpy(), adversarial[index].cpu().numpy(), y[index.to(y.device)].cpu().numpy())


class _Watched(nn.Module):
    """A module around any callable, as AutoAttack wants one; counts the images for the progress bar."""

    def __init__(self, model: Model, bar: tqdm):
        super().__init__()
        self.model, self.bar = model, bar

    def forward(self, x: Tensor) -> Tensor:
        self.bar.update(len(x))
        return self.model(x)


class _WatchedDraws(_Watched):
    """Of a model that shares work between its draws."""

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        self.bar.update(draws * len(x))
        return self.model.draw_logits(x, draws)  # type: ignore[attr-defined]


def _watched(model: Model, bar: tqdm) -> _Watched:
    return (_WatchedDraws if supports(model, SharesDraws) else _Watched)(model, bar)


@contextlib.contextmanager
def _bar(label: str, progress: bool, total: int | None) -> Iterator[tqdm]:
    with tqdm(
        total=total, desc=label, unit=" images", unit_scale=True, disable=not progress, leave=False, dynamic_ncols=True
    ) as bar:
        yield bar


@functools.cache
def _code() -> list[str]:
    """What decides a row besides its inputs: this package's sources, and the versions of what it calls."""
    sources = hashlib.blake2b(digest_size=16)
    root = Path(__file__).parents[1]
    for path in sorted(root.glob("*/*.py")):
        # the images and the weights have hashes of their own
        if path.parent.name not in ("data", "training", "demo"):
            sources.update(path.read_bytes())
    for path in sorted(root.glob("_C*.so")):
        sources.update(path.read_bytes())
    versions = [str(torch.__version__), os.environ.get("PURIFY_FAST_BACKEND", "")]
    for package in ("pyautoattack", "autoattack"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return [str(FORMAT), sources.hexdigest(), *versions]


def _fingerprint(model: Model) -> str | None:
    """A hash of a module's weights, structure and attributes; None for other callables."""
    if not isinstance(model, nn.Module):
        return None
    plain = [
        (path, type(module).__qualname__, sorted((k, _plain(v)) for k, v in vars(module).items() if _counts(k)))
        for path, module in model.named_modules()
    ]
    state = dict((*model.named_parameters(), *model.named_buffers()))  # with the buffers that state_dict leaves out
    text = f"{plain}{list(state)}{model!r}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + digest(*state.values())


def _counts(name: str) -> bool:
    return name != "training" and not name.startswith("_")


def _plain(value: Any) -> str:
    """What stands for an attribute in a fingerprint; functions count with their code, other objects by their type."""
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{value.__qualname__} {code.co_code.hex()} {code.co_consts} {code.co_names}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return _plain([[key, item] for key, item in value.items()])
    if value is None or isinstance(value, (bool, int, float, str, torch.Size, torch.dtype)):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


class _Store:
    """Finished rows in ``folder/rows``: the row as JSON, its example images beside it."""

    def __init__(self, folder: Path):
        self.folder = folder / "rows"
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Row | None:
        try:
            row = Row.from_dict(json.loads((self.folder / f"{key}.json").read_text()))
        except (OSError, ValueError, TypeError, KeyError):  # absent, or of another version
            return None
        with contextlib.suppress(OSError), np.load(self.folder / f"{key}.npz", allow_pickle=False) as file:
            row.examples = Examples(file["clean"], file["adversarial"], file["labels"])
        return row

    def put(self, key: str, row: Row) -> None:
        if row.examples is not None:
            with atomic(self.folder / f"{key}.npz") as temporary:
                np.savez(temporary, **vars(row.examples))
        write_text(self.folder / f"{key}.json", json.dumps(row.to_dict(), allow_nan=False))
