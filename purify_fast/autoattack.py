"""A replacement for the original class AutoAttack, which runs this package's attacks.

The arguments have the names and order of the original (Croce & Hein, ICML 2020; the package autoattack, which
RobustBench calls). The class translates them into a call of `purify_fast.evaluation.evaluate`. An argument that this
class does not support raises an error. To run the original implementation, use `purify_fast.attacks.OriginalAutoAttack`
or the protocol "official". These things differ from the original:

- The accuracy after each attack is printed and written after the last attack. Until then, the progress of ``evaluate``
  is shown, in which an image of a random model counts only if all draws are right.
- The search for an adversarial image ends early if it can hardly succeed any more.
- An image of a random model is attacked until several new draws all misclassify it. The printed accuracy is the mean
  over at least twenty other draws, so chance does not lower it.
- If the model has fewer classes than a loss needs, the margin replaces the loss.
- ``fab`` runs targeted FAB for one class after the other, with ``fab.n_restarts`` restarts, because this package has no
  untargeted FAB.
- ``device=None`` is the device of the model, ``seed=None`` is the seed 0, and images outside [0, 1] are refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ._files import check_folder
from ._validation import NormName, check_counts, check_literal, read_norm
from .attacks import Attack, frozen
from .defences.stochastic import undecided
from .judge.request.config import EvaluateConfig
from .judge.request.deadline import device_of
from .judge.request.preparation import AttackSpec, collect
from .judge.runner import evaluate
from .judge.searches.apgd import APGD
from .judge.searches.fab import FABT
from .judge.searches.model_tests import SAMPLE, check_model
from .judge.searches.square import Square
from .protocols import Classifier
from .speed.precision import whole_float32_by_default

Version = Literal["standard", "plus", "rand", "custom"]
AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

#: The attacks that each version runs. "custom" runs the attacks that `attacks_to_run` names.
RUN: dict[str, tuple[AttackName, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}

#: At least this number of draws of a random model judges each image.
JUDGES = 20


#: The fields of our attacks by their names in AutoAttack, if the names differ.
FIELDS = {"n_iter": "steps", "n_restarts": "restarts", "thr_decr": "rho"}


class Settings:
    """An attack, whose settings are read and set by their names in AutoAttack. Other names raise an AttributeError."""

    def __init__(self, attack: Any, *names: str):
        vars(self).update(attack=attack, names=names)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("attack"), self._field(name))

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)["attack"] = replace(self.attack, **{self._field(name): value})

    def _field(self, name: str) -> str:
        # A copy that is being made has no names yet.
        if name not in (names := vars(self).get("names", ())):
            raise AttributeError(f"{name} is not supported: the settings of this attack are {', '.join(names)}")
        return FIELDS.get(name, name)


class AutoAttack:
    """Run AutoAttack's attacks one after the other, each on the images that are still classified correctly.

    Change the attributes ``apgd``, ``apgd_targeted``, ``fab`` and ``square`` before a run to change the attacks.

    Args:
        model: a function from images ``[B, C, H, W]`` in [0, 1] to logits. A module is attacked in evaluation mode.
        norm: norm of the ball: "Linf", "L2" or "L1".
        eps: radius in image units.
        seed: seed of all random draws. None means 0.
        verbose: whether to print the accuracy after each attack.
        attacks_to_run: names of the attacks in their order; only with the version "custom".
        version: "standard", "plus", "rand" (for random models: 20 draws per step) or "custom".
        is_tf_model: must be False, because models of TensorFlow are not supported.
        device: device on which the model computes. None means the device of its parameters.
        log_path: path of a file to which the accuracy after each attack is appended. If None, no file is written.

    Attributes:
        apgd: `Settings` of ``apgd-ce`` and ``apgd-dlr``: ``n_iter`` steps in each of ``n_restarts`` runs. A step
            averages the gradient over ``eot_iter`` draws of a random model. The step size is checked several times in a
            run, and is halved if at most the share ``thr_decr`` of the steps since the last check raised the loss.
        apgd_targeted: `Settings` of ``apgd-t``, also ``n_target_classes``, the number of wrong classes that are tried.
        fab: ``n_restarts``, ``n_iter`` and ``n_target_classes`` of ``fab``. ``fab-t`` has a single run for each class.
        square: ``n_queries`` and ``n_restarts`` of ``square``.
        logger: ``logger.log(text)`` prints if ``verbose``, and appends to the file at ``log_path``.

    Raises:
        ValueError: a setting is not supported. The message names the setting. A norm, a radius or a name of an attack
            that is not allowed raises this error when a run begins.
    """

    # Setting an attribute that nothing reads, such as `n_queries` in place of `square.n_queries`, raises an error.
    __slots__ = (
        *("model", "norm", "epsilon", "seed", "verbose", "version", "log_path", "device", "attacks_to_run"),
        *("apgd", "apgd_targeted", "fab", "square", "logger"),
    )

    def __init__(
        self,
        model: Classifier,
        norm: NormName = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[AttackName] = (),
        version: Version = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
    ):
        if is_tf_model:
            raise ValueError("is_tf_model must be False, got True: models of TensorFlow are not supported")
        if version != "custom" and len(attacks_to_run) > 0:
            raise ValueError(f"attacks_to_run needs version='custom', got version={version!r}")
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.log_path, self.device = log_path, None if device is None else torch.device(device)
        self.attacks_to_run: list[AttackName] = list(attacks_to_run)
        names = ("n_restarts", "n_iter", "n_target_classes")
        self.apgd = Settings(APGD(steps=100, eot_iter=1, restarts=5, give_up=True), *names, "eot_iter", "thr_decr")
        self.apgd_targeted = Settings(replace(self.apgd.attack, loss="dlr_targeted", restarts=1), *self.apgd.names)
        self.fab = Settings(FABT(steps=100, restarts=5, give_up=True), *names)
        self.square = Settings(Square(give_up=True), "n_queries", "n_restarts")
        self.logger: Any = SimpleNamespace(log=self._log)
        self.set_version(version)

    def set_version(self, version: Version = "standard") -> None:
        """Set the attacks and settings of a version. "custom" keeps the current ones, and no version changes steps."""
        check_literal("version", version, Version)
        self.version = version
        if version == "custom":
            return
        l1 = version == "standard" and read_norm(self.norm) == "l1"
        self.attacks_to_run = list(RUN[version])
        self.apgd.n_restarts = 5 if version == "plus" or l1 else 1
        self.apgd.eot_iter = 20 if version == "rand" else 1
        self.apgd_targeted.n_restarts, self.apgd_targeted.n_target_classes = 1, 5 if l1 else 9
        self.fab.n_restarts, self.fab.n_target_classes = 5 if version == "plus" else 1, 9
        self.square.n_queries = 5000

    def get_seed(self) -> float:
        """The seed, or the time if it is None, as in the original. The attacks of this class then take the seed 0."""
        return time.time() if self.seed is None else self.seed

    def get_logits(self, x: Tensor) -> Tensor:
        """The model's logits for images ``[B, C, H, W]``, on its device, in the mode in which the model is."""
        return self.model(x.to(self._device(x)))

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        batch_size: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attack images, and return the adversarial images.

        Args:
            x_orig: images ``[N, C, H, W]``, uint8 or floating point in [0, 1].
            y_orig: labels, integers ``[N]``.
            bs: number of images that are attacked together.
            return_labels: whether to return also the classes that are predicted for the returned images.
            state_path: a folder that keeps the results of finished attacks, where the original has a file. A run that
                was killed continues with the attack that was killed if the call is repeated, and returns the same
                images. With another model, other images or other settings, the attacks run again.
            batch_size: the name of ``bs`` in pyautoattack. If both are given, ``bs`` is ignored.

        Returns:
            Images ``[N, C, H, W]``, float32 on the device of x_orig: for each image its adversarial image, or the
            original image if the attacks found none. For a random model, the adversarial image is the point that the
            largest number of draws misclassify, and the original image is returned if at least twenty other draws all
            classify this point correctly. The expected accuracy on the returned images is therefore up to 2 points
            above that of the points. With ``return_labels`` also the predicted classes, int64 ``[N]``, -1 without a
            class.

        Raises:
            ValueError: images, labels, names, the radius or counts are not allowed, or ``state_path`` is a file.
        """
        check_folder("state_path", state_path)
        return self._run(x_orig, y_orig, self.attacks_to_run, batch_size or bs, labels=return_labels, out=state_path)

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False, batch_size: int | None = None
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Run every attack by itself on all images.

        The arguments are those of `run_standard_evaluation`, and so is the result for each attack, by its name.
        """
        size = batch_size or bs
        return {name: self._run(x_orig, y_orig, [name], size, labels=return_labels) for name in self.attacks_to_run}

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of images that are classified correctly, with one prediction of each image, clean or adversarial.

        The arguments are those of `run_standard_evaluation`.
        """
        x, y, _ = collect(x_orig, y_orig)
        return float((self._classes(x, bs) == y.to(x.device)).float().mean())

    def _run(
        self, x: Tensor, y: Tensor, names: Sequence[str], size: int, labels: bool, out: str | Path | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_counts(bs=size)
        specs = [AttackSpec(self._attack(name), label=name.upper(), survivors_only=True) for name in names]
        x, y, notes = collect(x, y)
        device, draws = self._device(x), max(self.apgd.eot_iter, self.apgd_targeted.eot_iter)
        self.logger.log(f"using {self.version} version including {', '.join(names)}")
        judges, seed = max(JUDGES, draws), self.seed or 0
        config = EvaluateConfig(n_eval=judges, seed=seed, batch_size=size, probes=False, together=False)
        # A model without tensors computes on the device of the images.
        images = x if device_of(self.model, x) == device else x.to(device)
        judge = partial(evaluate, eps=self.epsilon, norm=self.norm, out=out, name="the model", config=config)
        report = judge(self.model, images, y, attacks=specs, progress=self.verbose)
        rows = [row for row in report.rows if row.kind != "worst"]
        for note in (*notes, *report.notes):
            self.logger.log(f"NOTE: {note}")
        if not rows[0].deterministic and draws == 1:
            self.logger.log("WARNING: the model is random, but each step uses a single draw: use version='rand'")
        for row in rows:
            what = "initial accuracy" if row.kind == "clean" else f"robust accuracy after {row.attack}"
            self.logger.log(f"{what}: {row.mean:.2%} ({row.seconds:.1f} s)")
            if row.nonfinite_predictions:
                self.logger.log(f"WARNING: {row.nonfinite_predictions} predictions are not finite, and count as wrong")
            if not row.reliable:
                self.logger.log(f"WARNING: {row.attack} had unusable gradients: {row.health_in_words()}")
        self.logger.log(f"robust accuracy: {rows[-1].mean:.2%}")
        images, fallen = x.clone(), report.adversarial
        assert fallen is not None
        images[torch.from_numpy(fallen.indices)] = torch.from_numpy(fallen.images).to(x.device)
        return (images, self._classes(images, size)) if labels else images

    def _attack(self, name: str) -> Attack:
        """Make an attack by its name, with the current settings."""
        check_literal("attacks_to_run", name, AttackName)
        if name in ("apgd-ce", "apgd-dlr"):
            return replace(self.apgd.attack, loss=name.removeprefix("apgd-"))
        if name == "fab-t":
            return replace(self.fab.attack, restarts=1)
        return {"apgd-t": self.apgd_targeted, "fab": self.fab, "square": self.square}[name].attack

    @torch.no_grad()
    @whole_float32_by_default()
    def _classes(self, x: Tensor, size: int) -> Tensor:
        """The classes that are predicted in evaluation mode, batch by batch; -1 for a prediction without a class."""
        with frozen(self.model):
            check_model(self.get_logits, x[:SAMPLE].clone())
            logits = torch.cat([self.get_logits(part).to(x.device) for part in x.split(size)])
        return logits.argmax(1).masked_fill(undecided(logits), -1)

    def _device(self, x: Tensor) -> torch.device:
        return device_of(self.model, x) if self.device is None else self.device

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text)
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as log:
                log.write(text + "\n")
