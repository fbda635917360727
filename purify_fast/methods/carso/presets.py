"""The published CARSO systems, number by number, each with the grade of its source.

`Preset.sources` maps every number to one of these grades, and to the file where there is one:

    R   the official repository (emaballarin/CARSO, commit 307b873)
    RV  an earlier commit of it, for the first version of the method (8dadfc8, 5f65f97)
    E   its support library (emaballarin/ebtorch, commit e9f8d99)
    RB  RobustBench's model table, whose statistics the official files repeat
    DM  the repository of Wang et al. 2023, likewise
    S   second-hand: several public reviews of the paper agree
    X   read off the official modules, run with fresh weights
    I   inferred, or computed from numbers of another grade
    M   not verified; no number here is of this grade

The numbers of the training itself that hold for every system (the KL weight 1, the weak attacks' half radius, the
losses) stand in `CarsoConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ...models.classifiers import FullyConnected
from ...models.wide_resnet import WideResNet, representation_layers
from ...training.attack import TrainingAttack
from ...training.config import FitConfig
from .config import CarsoConfig, EpsMode, Schedule, atom_size
from .networks import published_decoder

GRADES = ("R", "RV", "E", "RB", "DM", "S", "X", "I", "M")


@dataclass(frozen=True)
class Preset:
    """One published system: data, classifier, purifier, training.

    Args:
        data: the data set.
        image_shape: (C, H, W) of its images.
        num_classes: of the data set.
        mean: of the data set's channels.
        std: of the data set's channels.
        classifier: its name in `purify_fast.models.CLASSIFIERS`.
        depth: of the classifier; 0 where it has none.
        width: of the classifier; 0 where it has none.
        weights: what the published classifier's weights are called, which are not part of this package.
        layers: the representation's modules.
        version: of `Carso`.
        cond_dim: of `Carso`.
        latent_dim: of `Carso`.
        samples: of `Carso`.
        encoder_depth: of `Carso`.
        epochs: of the whole run.
        batch_size: of all processes together.
        processes: that the run was divided over, which sets the number of attacks per batch.
        adversarial_fraction: of `CarsoConfig`.
        eps: of the training's attack, in image units.
        steps: of the training's attack.
        alpha: step of the training's attack, in image units.
        kl_delay: of `CarsoConfig`.
        learning_rate: of `CarsoConfig`.
        lookahead_steps: of `CarsoConfig`.
        lookahead_alpha: of `CarsoConfig`.
        schedule: of `CarsoConfig`.
        sources: per number, the grade of its source, and the file.
    """

    data: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classifier: str
    depth: int
    width: int
    weights: str
    layers: tuple[str, ...]
    version: Literal["v4", "v1"]
    cond_dim: int
    latent_dim: int
    samples: int
    encoder_depth: int
    epochs: int
    batch_size: int
    processes: int
    adversarial_fraction: float
    eps: float
    steps: int
    alpha: float
    kl_delay: float
    learning_rate: float
    lookahead_steps: int
    lookahead_alpha: float
    schedule: Schedule
    sources: dict[str, str] = field(repr=False)

    def build_classifier(self) -> nn.Module:
        """The system's classifier, with fresh weights."""
        channels, *size = self.image_shape
        statistics = {"mean": self.mean, "std": self.std, "in_channels": channels, "num_classes": self.num_classes}
        if self.classifier == "wide_resnet":
            return WideResNet(self.depth, self.width, **statistics)  # type: ignore[arg-type]
        return FullyConnected(image_size=size, **statistics)  # type: ignore[arg-type]

    def arguments(self) -> dict[str, Any]:
        """What `Carso` takes beside the classifier."""
        return {
            "layers": self.layers,
            "image_shape": self.image_shape,
            "cond_dim": self.cond_dim,
            "latent_dim": self.latent_dim,
            "samples": self.samples,
            "encoder_depth": self.encoder_depth,
            "mean": self.mean,
            "std": self.std,
            "decoder": published_decoder(self.image_shape) if self.version == "v4" else None,
            "version": self.version,
        }

    def method(self, official_code: bool = False) -> CarsoConfig:
        """The training's numbers as the paper states them, or as the official code runs them.

        The code scales eps (`CarsoConfig.eps_mode`), and rounds the attacks per batch down in every process:
        TinyImageNet is trained without any adversarial example that way.
        """
        fraction = self.adversarial_fraction
        mode: EpsMode = "paper"
        if official_code:
            local = self.batch_size // self.processes
            fraction = 4 * atom_size(local, fraction, allow_none=True) / local
            mode = "official_code" if self.version == "v4" else "paper"
        return CarsoConfig(
            attack=TrainingAttack(eps=self.eps, steps=self.steps, alpha=self.alpha),
            eps_mode=mode,
            adversarial_fraction=fraction,
            allow_no_adversarial=fraction == 0,
            kl_delay=self.kl_delay,
            reduction="sum",
            optimizer="radam_lookahead",
            lookahead_steps=self.lookahead_steps,
            lookahead_alpha=self.lookahead_alpha,
            schedule=self.schedule,
            learning_rate=self.learning_rate,
        )

    def loop(self) -> FitConfig:
        """Epochs and batch size; no augmentation."""
        return FitConfig(epochs=self.epochs, batch_size=self.batch_size)


def _v4(script: str, statistics: str, **numbers: Any) -> Preset:
    """A system of the paper's versions 4 to 6; ``script`` is its official training script."""
    official = f"R {script}"
    sources = {
        **dict.fromkeys(("image_shape", "num_classes", "cond_dim", "latent_dim"), official),
        **dict.fromkeys(("mean", "std"), statistics),
        **dict.fromkeys(("depth", "width"), official),
        "samples": "R eval_*.py",
        "encoder_depth": "R modelpieces.py",
        **dict.fromkeys(("epochs", "adversarial_fraction"), official),
        "batch_size": "R carsotrain_*.sh",
        "processes": "R carsotrain_*.sh",
        "eps": "S the paper, against the code: see eps_mode",
        **dict.fromkeys(("steps", "alpha"), "R attacks.py"),
        "kl_delay": official,
        "learning_rate": "I 1e-4 times batch_size / processes",
        "lookahead_steps": official,
        "lookahead_alpha": "E optim/custom.py",
    }
    return Preset(
        classifier="wide_resnet",
        depth=28,
        width=10,
        layers=tuple(representation_layers(28)),
        version="v4",
        samples=8,
        eps=8 / 255,
        steps=40,
        alpha=0.01,
        kl_delay=0.125,
        lookahead_steps=6,
        lookahead_alpha=0.8,
        schedule="published",
        sources=sources,
        **numbers,
    )


PRESETS: dict[str, Preset] = {
    "cifar10": _v4(
        "train_a.py",
        "RB Cui2023Decoupled_WRN-28-10",
        data="CIFAR-10",
        image_shape=(3, 32, 32),
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        weights="cifar10_a3_b10_t4_20m_w",
        cond_dim=512,
        latent_dim=128,
        encoder_depth=3,
        epochs=200,
        batch_size=5120,
        processes=8,
        adversarial_fraction=0.5,
        learning_rate=0.064,
    ),
    "cifar100": _v4(
        "train_b.py",
        "RB Cui2023Decoupled_WRN-28-10",
        data="CIFAR-100",
        image_shape=(3, 32, 32),
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        weights="cifar100_a5_b12_t4_50m_w",
        cond_dim=512,
        latent_dim=128,
        encoder_depth=3,
        epochs=200,
        batch_size=2560,
        processes=4,
        adversarial_fraction=0.15,
        learning_rate=0.064,
    ),
    "tiny_imagenet": _v4(
        "train_c.py",
        "DM tiny_linf_wrn28-10",
        data="TinyImageNet-200",
        image_shape=(3, 64, 64),
        num_classes=200,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        weights="tiny_linf_wrn28_10_w",
        cond_dim=768,
        latent_dim=192,
        encoder_depth=4,
        epochs=250,
        batch_size=1024,
        processes=8,
        adversarial_fraction=0.01,
        learning_rate=0.0128,
    ),
    "mnist_v1": Preset(
        data="MNIST",
        image_shape=(1, 28, 28),
        num_classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        classifier="fully_connected",
        depth=0,
        width=0,
        weights="fcn_mnist_adv",
        layers=("body.1", "body.5", "body.9"),
        version="v1",
        cond_dim=130,
        latent_dim=64,
        samples=4,
        encoder_depth=3,
        epochs=150,
        batch_size=1536,
        processes=1,
        adversarial_fraction=0.4,
        eps=0.3,
        steps=40,
        alpha=0.01,
        kl_delay=0.0,
        learning_rate=0.04608,
        lookahead_steps=5,
        lookahead_alpha=0.8,
        schedule="published_v1",
        sources={
            **dict.fromkeys(("image_shape", "cond_dim", "latent_dim", "num_classes"), "RV train_a_carso.py"),
            **dict.fromkeys(("mean", "std"), "RV architectures.py"),
            **dict.fromkeys(("depth", "width", "encoder_depth"), "I no effect on this system"),
            "samples": "RV eval_a_individual.py",
            **dict.fromkeys(("epochs", "batch_size", "processes", "adversarial_fraction"), "RV train_a_carso.py"),
            **dict.fromkeys(("eps", "steps", "alpha"), "RV attacks.py"),
            "kl_delay": "RV train_a_carso.py",
            "learning_rate": "I 3e-5 times batch_size",
            "lookahead_steps": "RV train_a_carso.py",
            "lookahead_alpha": "E optim/custom.py",
        },
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name; ValueError listing them for any other."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
