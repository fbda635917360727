"""The command ``purify-fast train diffusion``, and the options of purification by diffusion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..methods.diffusion.config import DiffusionConfig
from ..training import FitConfig
from .command import Command
from .saved_models import saved_folder, trained_classifier
from .train_purifier import saved_start
from .training import OnClassifier

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..training import Task

_NETWORK = ("width", "patch", "attention")
_PROCESS = ("t_star", "denoising_steps", "solver")


@dataclass(frozen=True)
class Purification(Command):
    """A command that purifies by diffusion.

    Args:
        t_star: For a diffusion purifier: time t* up to which noise is added, as a share of the diffusion process.
            Several numbers mean several rounds of purification. Default: the saved time, or 0.1.
        denoising_steps: For a diffusion purifier: number of steps of the solver from t* back to 0, or a number for each
            round. Default: the saved number, or all steps of the training's process.
        solver: For a diffusion purifier: solver that removes the noise. Default: the saved solver, or ddpm.
    """

    t_star: tuple[float, ...] = ()
    denoising_steps: tuple[int, ...] = ()
    solver: Literal["ddpm", "ddim", "vp_sde", "ode", "one_shot"] | None = None

    def process(self) -> dict[str, Any] | None:
        """The given options as fields of `purify_fast.methods.diffusion.Process`; None if there are none."""
        times, steps = (each[0] if len(each) == 1 else each for each in (self.t_star, self.denoising_steps))
        given = {"t_star": times, "steps": steps, "solver": self.solver}
        return {name: value for name, value in given.items() if value not in ((), None)} or None


@dataclass(frozen=True)
class TrainDiffusion(OnClassifier, Purification):
    """Train a denoiser for a diffusion purifier: on clean images, by distillation, or through the purification.

    On clean images no classifier is needed: `evaluate OUT --classifier FOLDER` puts the denoiser in front of a
    classifier. With --intervals, the denoiser of --init is distilled into a denoiser that is evaluated only once per
    image. With --eps, the denoiser of --init is fine-tuned with the cross-entropy of --classifier on attacked and
    purified images. An interrupted training continues if the same command is run again.

    Args:
        init: Folder that this command wrote before, or zoo:NAME. Its denoiser is fine-tuned or distilled.
        width: Number of channels of the U-Net at full size: a multiple of 16, or an even number below 16.
        patch: Side of the squares of pixels that the U-Net turns into channels. With 2, the U-Net takes a quarter of
            the operations that it takes with 1.
        attention: Use attention over all positions at the lowest level of the U-Net.
    """

    called: ClassVar[str] = "train diffusion"

    out: Path = Path("runs/denoiser")
    init: Path | None = None
    width: int = 32
    patch: int = 1
    attention: bool = True
    method: DiffusionConfig = field(default_factory=DiffusionConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch_size=64))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.attack.eps > 0 and None in (self.init, self.classifier):
            eps = f"--eps {self.method.attack.eps:g}"
            raise ValueError(f"{eps} trains a denoiser through the purification: give both --init and --classifier")
        if self.method.intervals and self.init is None:
            raise ValueError(f"--intervals {self.method.intervals} distills a denoiser: give the denoiser by --init")

    def ignored_beside(self) -> dict[tuple[str, ...], str]:
        eps, distilled = self.method.attack.eps > 0, self.method.intervals > 0
        ignored: dict[tuple[str, ...], str] = {}
        if not eps:
            message = "leave out {given}, or give an --eps above 0, which trains through the purification"
            ignored[("classifier", "classifier_weights", "denoising_weight", *_PROCESS)] = message
        if eps or distilled:
            ignored[(*_NETWORK, "noise_schedule", "prediction")] = (
                f"--init {self.init} sets the network: leave out {{given}}"
            )
        else:
            ignored[("init",)] = "leave out {given}, or give an --eps or an --intervals above 0"
        return ignored

    def task(self, images: DataSet) -> Task:
        import torch

        from ..methods.diffusion import DiffusionTask
        from ..models import UNet

        torch.manual_seed(self.loop.seed)
        if self.method.attack.eps > 0:
            return self.fine_tuning(images)
        if self.method.intervals:
            return self.distillation(images)
        network = UNet(images.image_shape[0], self.width, patch=self.patch, attention=self.attention)
        return DiffusionTask(network.to(images.y_train.device), self.method)

    def fine_tuning(self, images: DataSet) -> Task:
        """Make the task that trains the denoiser through the purification."""
        from .._tensors import weights_fingerprint
        from ..methods.diffusion import DiffusionPurifier, PurificationTask

        # `__post_init__` has checked that the user gave both.
        assert self.init is not None and self.classifier is not None
        classifier = trained_classifier(self.classifier, self.classifier_weights, images)
        options = {"check": False, "process": self.process()}
        defence = saved_start(saved_folder(self.init), DiffusionPurifier, classifier, **options)
        return PurificationTask(defence, self.method, weights_fingerprint(defence.denoiser))

    def distillation(self, images: DataSet) -> Task:
        """Make the task that distills a denoiser into a denoiser that is evaluated only once."""
        from .._tensors import weights_fingerprint
        from ..methods.diffusion import ConsistencyTask

        denoiser, saved = self.saved_denoiser()
        if self.method.last_time > saved["last_time"]:
            raise ValueError(
                f"--last-time must be at most {saved['last_time']}, because the denoiser of {self.init} was not "
                f"trained for later times, got {self.method.last_time}: give --last-time {saved['last_time']}"
            )
        origin = weights_fingerprint(denoiser)
        return ConsistencyTask(denoiser.to(images.y_train.device), self.method, origin, process=saved["process"])

    def saved_denoiser(self) -> tuple[nn.Module, dict[str, Any]]:
        """Load the denoiser of --init and its saved settings."""
        from ..methods.diffusion.denoiser import read_denoiser

        # `__post_init__` has checked that the user gave --init.
        assert self.init is not None
        return read_denoiser(saved_folder(self.init))

    def save(self, trained: Any, images: DataSet) -> None:
        from ..methods.diffusion import DiffusionPurifier, save_denoiser
        from ..training import save_classifier

        if isinstance(trained, DiffusionPurifier):
            trained.save(self.out)
            save_classifier(trained.classifier, self.out / "classifier")
            return
        process: dict[str, Any] = {"schedule": self.method.noise_schedule, "prediction": self.method.prediction}
        if self.method.intervals:
            saved = self.saved_denoiser()[1]["process"]
            process = {name: saved[name] for name in ("schedule", "prediction", "times") if name in saved}
            process["solver"] = "one_shot"
        save_denoiser(trained, self.out, images.image_shape, process, last_time=self.method.last_time)
