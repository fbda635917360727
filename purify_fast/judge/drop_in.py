"""A replacement for the original class AutoAttack, which runs this package's attacks.

The arguments have the names and order of the original (Croce & Hein, ICML 2020; the package autoattack, which
RobustBench calls). An argument that this class does not support raises an error. To run the original implementation,
use `purify_fast.attacks.OriginalAutoAttack` or the protocol "official". These things differ from the original:

- The search for an adversarial image ends early if it can hardly succeed any more.
- An image of a random model is attacked until several new draws all misclassify it, as many as a step of the attack
  averages. The printed accuracy is the mean over at least five other draws, so chance does not lower it.
- If the model has fewer classes than a loss needs, the margin replaces the loss.
- ``fab`` runs targeted FAB for one class after the other, with ``fab.n_restarts`` restarts, because this package has no
  untargeted FAB.
- ``device=None`` is the device of the model, ``seed=None`` is the seed 0, and images outside [0, 1] are refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from .._files import write_text
from .._tensors import digest
from .._validation import NormName, check_counts, check_literal, read_norm
from ..attacks import Attack, frozen
from ..attacks.arguments import check_eps, check_labels
from ..attacks.attacked_model import TRIED_CALLS, drawn_once_per_call
from ..attacks.gradient_copy import Copies
from ..attacks.health import MAX_NONFINITE, MAX_ZERO, GradientHealth
from ..ops import kernels_now
from ..protocols import Classifier
from ..speed.agreement import differ
from ..speed.precision import whole_float32_by_default
from .request.fingerprint import fingerprint
from .request.preparation import collect
from .request.subject import TRIED, device_of
from .run.cache import RowCache
from .searches.apgd import APGD
from .searches.engine.judge import Judge, has_fallen
from .searches.fab import FABT
from .searches.judge_context import JudgeContext
from .searches.model_tests import SAMPLE, check_model, draws_elsewhere
from .searches.square import Square

Version = Literal["standard", "plus", "rand", "custom"]
AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

#: The attacks that each version runs. "custom" runs the attacks that `attacks_to_run` names.
RUN: dict[str, tuple[AttackName, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}

#: The ``points`` that an attack has found, the ``share`` of the draws that misclassify each, and the attack's counts.
Found = dict[str, Any]
Kept = Callable[[Tensor, Callable[[], Found]], Found]

#: At least this number of draws of a random model judges each image.
JUDGES = 5


# With slots, setting an attribute that this package does not support raises an error.
@dataclass(slots=True)
class FabSettings:
    """FAB's settings, by their names in AutoAttack.

    Args:
        n_restarts: number of runs of ``fab`` for each target class. ``fab-t`` has a single run for each target class.
        n_iter: number of steps in a run.
        n_target_classes: number of wrong classes that are tried as targets.
    """

    n_restarts: int = 5
    n_iter: int = 100
    n_target_classes: int = 9


@dataclass(slots=True)
class ApgdSettings(FabSettings):
    """Auto-PGD's settings, by their names in AutoAttack.

    Args:
        n_restarts: number of runs on each image; ``apgd-t`` makes this number of runs for each target class.
        n_iter: number of gradient steps in a run.
        n_target_classes: number of wrong classes that ``apgd-t`` tries as targets. The other losses have no targets.
        eot_iter: number of draws of a random model over which each gradient step averages the gradient.
        thr_decr: the step size is checked several times in a run. A check halves the step size if at most this share of
            the steps since the previous check raised the loss.
    """

    eot_iter: int = 1
    thr_decr: float = 0.75


@dataclass(slots=True)
class SquareSettings:
    """Square's settings, by their names in AutoAttack.

    Args:
        n_queries: number of queries in a run.
        n_restarts: number of runs on each image.
    """

    n_queries: int = 5000
    n_restarts: int = 1


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
        apgd: `ApgdSettings` of ``apgd-ce`` and ``apgd-dlr``.
        apgd_targeted: `ApgdSettings` of ``apgd-t``.
        fab: `FabSettings` of ``fab`` and ``fab-t``.
        square: `SquareSettings` of ``square``.
        logger: ``logger.log(text)`` prints if ``verbose``, and appends to the file at ``log_path``.

    Raises:
        ValueError: a setting is not allowed or not supported. The message names the setting.
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
        check_eps(eps, read_norm(norm))
        check_literal("version", version, Version)
        if is_tf_model:
            raise ValueError("is_tf_model must be False, got True: models of TensorFlow are not supported")
        if version != "custom" and len(attacks_to_run) > 0:
            raise ValueError(f"attacks_to_run needs version='custom', got version={version!r}")
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.version, self.log_path = version, log_path
        self.device = None if device is None else torch.device(device)
        self.attacks_to_run: list[AttackName] = list(attacks_to_run)
        self.apgd, self.apgd_targeted = ApgdSettings(), ApgdSettings(n_restarts=1)
        self.fab, self.square = FabSettings(), SquareSettings()
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
            state_path: path of a file to which the state of the run is written, in the original's form. The folder
                ``<state_path>.attacks`` keeps what the attacks have found. A run that was killed continues if the call
                is repeated, and returns the same images. A call with another model, other images or other settings
                begins anew. The model must then be a module, because a function does not tell whether it has changed.
            batch_size: the name of ``bs`` in pyautoattack. If both are given, ``bs`` is ignored.

        Returns:
            Images ``[N, C, H, W]``, float32 on the device of x_orig: for each image its adversarial image, or the
            original image if the attacks found none. For a random model, the adversarial image is the point that the
            largest number of draws misclassify. With ``return_labels`` also the predicted classes, int64 ``[N]``, -1
            for NaN.

        Raises:
            ValueError: images, labels, names or counts are not allowed; the model cannot be compared with that of an
                earlier run, or another program wrote the file ``state_path``.
        """
        state = None if state_path is None else Path(state_path)
        return self._run(x_orig, y_orig, self.attacks_to_run, batch_size or bs, return_labels, state=state)

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False, batch_size: int | None = None
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Run every attack by itself on all images.

        The arguments are those of `run_standard_evaluation`, and so is the result for each attack, by its name.
        """
        size = batch_size or bs
        return {name: self._run(x_orig, y_orig, [name], size, return_labels) for name in self.attacks_to_run}

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of images that are classified correctly, with one prediction of each image, clean or adversarial.

        The arguments are those of `run_standard_evaluation`.
        """
        x, y, _ = collect(x_orig, y_orig)
        return float((_classes(self._logits(x, bs)) == y.to(x.device)).float().mean())

    @whole_float32_by_default()
    @torch.inference_mode(False)
    def _run(
        self, x: Tensor, y: Tensor, names: Sequence[str], size: int, return_labels: bool, state: Path | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_counts(bs=size)
        attacks = {name: self._attack(name) for name in names}
        x, y, notes = collect(x, y)
        check_eps(self.epsilon, read_norm(self.norm), pixels=x[0].numel())
        begun, seed = time.monotonic(), 0 if self.seed is None else self.seed
        device = self._device(x)
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []), frozen(self.model):
            torch.manual_seed(seed)
            model, classes = self.model, check_model(self.model, x[:SAMPLE].to(device, copy=True))
            check_labels("y_orig (labels)", y.cpu(), classes)
            draws = max([attack.eot_iter or 1 for attack in attacks.values()], default=1)
            some = x[:SAMPLE].to(device)
            with torch.no_grad():
                one = model(some.clone())
                is_random = any(differ(one, model(some.clone())) for _ in range(TRIED_CALLS))
            is_random = is_random or draws_elsewhere(model, x[:TRIED].to(device), SAMPLE)
            self.logger.log(f"using {self.version} version including {', '.join(names)}")
            for note in notes:
                self.logger.log(f"NOTE: {note}")
            if is_random and draws == 1:
                self.logger.log("WARNING: the model is random, but each step uses a single draw: use version='rand'")
            context = JudgeContext(
                eps=float(self.epsilon),
                norm=self.norm,
                num_classes=classes,
                seed=seed,
                draws_differ=is_random and draws > 1,
                judge_draws=draws,
                batch_size=size,
                counts_health=True,
                copies=Copies(some),
            )
            cache = _cache_beside(state, model, device)
            facts = {"data": digest(x, y), "seed": seed, "size": size, "draws": [is_random, draws]}

            def kept(attack: Attack, part: Tensor, make: Callable[[], Found]) -> Found:
                # A random model draws the same numbers in a run that continues.
                torch.manual_seed(seed)
                how = [attack.identity(), attack.revision(), attack.settings(context)]
                return cache.values(cache.key({**facts, "attack": how, "part": digest(part)}, model), make)

            attacked = AttackSequence(model, x, y, context, device)
            judges = max(draws, JUDGES) if is_random else 1
            left = clean = attacked.accuracy(judges)
            self.logger.log(f"initial accuracy: {left:.2%}")
            for number, (name, attack) in enumerate(attacks.items()):
                _write_state(state, names, number, attacked.fallen, clean)
                if bool(attacked.fallen.all()):
                    break
                health = attacked.run(attack, partial(kept, attack))
                left = attacked.accuracy(judges)
                spent = time.monotonic() - begun
                self.logger.log(f"robust accuracy after {name.upper()}: {left:.2%} (total time {spent:.1f} s)")
                if health.nonfinite > MAX_NONFINITE or health.zero > MAX_ZERO:
                    shares = f"{health.zero:.0%} of its gradients are zero, {health.nonfinite:.0%} are not finite"
                    self.logger.log(f"WARNING: {name.upper()} had unusable gradients: {shares}")
            _write_state(state, names, len(names), attacked.fallen, clean)
            found = attacked.images
            logits = self._logits(found, size)
            if lost := int(logits.isnan().any(1).sum()):
                self.logger.log(
                    f"WARNING: the model returns NaN for {lost} of the returned images, which counts as wrong"
                )
            self.logger.log(f"robust accuracy: {left:.2%}")
            return (found, _classes(logits)) if return_labels else found

    def _attack(self, name: str) -> Attack:
        """Make an attack by its name, with the current settings."""
        check_literal("attacks_to_run", name, AttackName)
        if name == "square":
            return Square(n_queries=self.square.n_queries, restarts=self.square.n_restarts, give_up=True)
        if name in ("fab", "fab-t"):
            fab = self.fab
            restarts = fab.n_restarts if name == "fab" else 1
            return FABT(steps=fab.n_iter, n_target_classes=fab.n_target_classes, restarts=restarts, give_up=True)
        apgd = self.apgd_targeted if name == "apgd-t" else self.apgd
        return APGD(
            loss={"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr_targeted"}[name],  # type: ignore[arg-type]
            steps=apgd.n_iter,
            restarts=apgd.n_restarts,
            eot_iter=apgd.eot_iter,
            rho=apgd.thr_decr,
            n_target_classes=apgd.n_target_classes,
            give_up=True,
        )

    @torch.no_grad()
    def _logits(self, x: Tensor, size: int) -> Tensor:
        """The logits of images, in evaluation mode and batch by batch, on the device of the images."""
        device = self._device(x)
        with frozen(self.model):
            check_model(self.model, x[:SAMPLE].to(device, copy=True))
            return torch.cat([self.model(part.to(device)).to(x.device) for part in x.split(size)])

    def _device(self, x: Tensor) -> torch.device:
        return device_of(self.model, x) if self.device is None else self.device

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text)
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as log:
                log.write(text + "\n")


class AttackSequence:
    """Runs attacks one after the other, each on the images that withstood all earlier attacks.

    ``images`` are the best points so far. ``share`` is the share of the draws that chose a point, and misclassify it,
    ``[N]``. For a random model it is too high, because these draws made the choice: `accuracy` takes other draws. The
    caller must freeze the model.
    """

    def __init__(self, model: Classifier, x: Tensor, y: Tensor, context: JudgeContext, device: torch.device):
        self.model, self.x, self.y, self.context, self.device = model, x, y.to(x.device), context, device
        self.images, self.judge = x.clone(), self._judge_by(context.judges(context.eot_iter))
        self.share = self._shares(self.judge)

    @property
    def fallen(self) -> Tensor:
        """True for the images that every draw misclassifies, bool ``[N]``."""
        return has_fallen(self.share)

    def accuracy(self, draws: int) -> float:
        """The accuracy of a single draw on the best points, by ``draws`` fresh draws (1 for a deterministic model)."""
        fresh = self.context.draws_differ or draws > 1
        return 1 - float((self._shares(self._judge_by(draws)) if fresh else self.share).mean())

    def run(self, attack: Attack, kept: Kept = lambda part, make: make()) -> GradientHealth:
        """Run an attack on the images that have not fallen yet, and return what it counted, if it counts.

        ``kept(part, make)`` returns what ``make()`` finds for the images with the indices ``part``, or has found.
        """
        health = GradientHealth()
        for part in self._batches((~self.fallen).nonzero()[:, 0]):
            found = kept(part, partial(self._found, attack, part))
            points, share = (found.pop(name).to(self.x.device) for name in ("points", "share"))
            health.add(**found)
            better = share > self.share[part]
            self.images[part[better]], self.share[part[better]] = points[better], share[better]
        return health

    def _found(self, attack: Attack, part: Tensor) -> Found:
        x, y = self.x[part].to(self.device), self.y[part].to(self.device)
        result = attack.search(self.model, x, y, replace(self.context, sample_ids=part.to(self.device)))
        counts = {} if result.health is None else {name: int(count) for name, count in result.health.counts.items()}
        return {"points": result.images, "share": self.judge.shares(result.images, y), **counts}

    def _batches(self, index: Tensor) -> tuple[Tensor, ...]:
        return index.split(self.context.batch_size or max(1, len(index)))

    def _judge_by(self, draws: int) -> Judge:
        most = self.context.max_forward_batch
        apart = drawn_once_per_call(self.model, self.x[:SAMPLE].to(self.device), draws, most)
        return Judge(self.model, draws, most, apart)

    def _shares(self, judge: Judge) -> Tensor:
        """The shares of the draws that misclassify the best points, ``[N]``."""
        parts = self._batches(torch.arange(len(self.x), device=self.x.device))
        shares = [judge.shares(self.images[part].to(self.device), self.y[part].to(self.device)) for part in parts]
        return torch.cat(shares).to(self.x.device)


def _cache_beside(state: Path | None, model: Classifier, device: torch.device) -> RowCache:
    """The cache of a run in the folder beside its state; a cache that keeps nothing if there is no state."""
    if state is None:
        return RowCache(None)
    folder, mark = Path(f"{state}.attacks"), fingerprint(model)
    if mark is None:
        raise ValueError(f"state_path needs a torch.nn.Module that can be compared with an earlier one, got {model!r}")
    if state.exists() and not folder.is_dir():
        raise ValueError(f"state_path must be a new file, or the state of a run of this class, got {state}")
    cache = RowCache(folder, kernels_now(device))
    cache.register(model, mark)
    return cache


def _write_state(state: Path | None, names: Sequence[str], done: int, fallen: Tensor, clean: float) -> None:
    """Write the state of a run after ``done`` attacks, as the class EvaluationState of the original reads it."""
    if state is None:
        return
    left = {"_robust_flags": (~fallen).tolist(), "_clean_accuracy": clean}
    ran = {"_attacks_to_run": list(names), "_run_attacks": list(names[:done])}
    write_text(state, json.dumps({"path": str(state), **ran, **left, "_last_saved": str(datetime.now())}))


def _classes(logits: Tensor) -> Tensor:
    """The predicted classes, -1 for a prediction with NaN, which is wrong."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)
