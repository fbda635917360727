"""The settings of CARSO's training, each with its source."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ..._validation import AtLeast0, Count, Precision, Range, Share, check_types
from ...training.config import TrainingAttack
from ...training.schedules import DelayUnit


@dataclass(frozen=True)
class CarsoConfig:
    """The settings of the training of CARSO's purifier. "Paper" is arXiv 2306.06081; "own" is this package's choice.

    Two trainings share these settings. kl_delay, beta, free_bits, reduction, eps_mode and adversarial_fraction belong
    to the published one: through the pipeline kl_delay, beta and adversarial_fraction have no effect, and the other
    three must stay as they are. train_samples, targets and reconstruction_weight belong to the pipeline's alone.

    Args:
        attack_target: the target of the attacks on training examples: "classifier" (paper), or "pipeline", the whole
            defence with exact gradients (own).
        attack: the attack. Paper: eps 8/255 for color images and 0.3 for MNIST, linf, 40 steps of 0.01, which is made
            for eps 8/255; alpha None is own. The weak attacks of the published training have half of eps (paper), and
            the same alpha if one is given.
        eps_mode: "paper" takes eps as it is. "official_code" divides it by the mean of the defence's std: the official
            code attacks images that are not normalized with a radius made for normalized ones.
        adversarial_fraction: share of each batch that is attacked, divided among four attacks (paper: 0.5, on
            CIFAR-10).
        allow_no_adversarial: whether to train even if that leaves no image for the attacks, as the official
            TinyImageNet run did.
        kl_delay: how long the KL term is left out (paper: 0.125 of the epochs); then its weight rises over a third as
            long. Both are rounded up to whole units, and the weight is still 0 in the unit in which it begins to rise:
            with a delay of 1 epoch it is 0 in the first two epochs and full from the third on. 0 lets the term act at
            its full weight from the first step on.
        kl_delay_unit: unit of kl_delay: "share" of the epochs (paper), "epochs", "steps" or "images".
        beta: weight of the KL term at the end (paper: 1).
        free_bits: nats of the batch's mean KL that cost nothing, against posterior collapse (paper: 0; Kingma et al.,
            NeurIPS 2016, with the whole latent as one group).
        train_samples: reconstructions per image, K, while training through the pipeline.
        targets: targets of the K predictions of an attacked image while training through the pipeline: "labels", by
            cross-entropy (own), or "classifier", the probabilities that the frozen classifier gives the clean image, by
            their divergence (adversarially robust distillation, Goldblum et al., AAAI 2020, arXiv 1905.09747).
        reconstruction_weight: weight of the reconstruction term while training through the pipeline (own: 0.02).
        joint: whether the classifier's copy is trained too, through the pipeline only (own; the paper's is frozen).
        reduction: reduction of the loss over the batch, "mean" (own) or "sum" (paper).
        optimizer: "adamw" (own), or "radam_lookahead", RAdam within Lookahead (paper), of which the slow weights
            remain.
        lookahead_steps: fast steps per slow step of Lookahead (paper: 6).
        lookahead_alpha: length of Lookahead's slow step (paper: 0.8).
        schedule: schedule of the learning rate: "one_cycle" (own), "published" or "published_v1"; see
            `purify_fast.training.schedules`.
        precision: "float32", which on a GPU is that of IEEE too (the official code leaves PyTorch's default, by which
            cuDNN's convolutions round to TF32); "tf32" (own), which there rounds what is
            multiplied to ten bits of mantissa, while `purify_fast.training.fit` trains; or
            "bfloat16" to train the accelerated defence (own).
        learning_rate: the highest rate of the schedule (paper: 1e-4 times the batch of one process, with the sum).
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a setting out of range, or one that would have no effect; the message names it.
    """

    attack_target: Literal["classifier", "pipeline"] = "classifier"
    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=40)
    eps_mode: Literal["paper", "official_code"] = "paper"
    adversarial_fraction: Share = 0.5
    allow_no_adversarial: bool = False
    kl_delay: Annotated[float, Range(0, below=True)] = 0.125
    kl_delay_unit: Literal["share", "epochs", "steps", "images"] = "share"
    beta: AtLeast0 = 1.0
    free_bits: AtLeast0 = 0.0
    train_samples: Count = 1
    targets: Literal["labels", "classifier"] = "labels"
    reconstruction_weight: AtLeast0 = 0.02
    joint: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: Literal["adamw", "radam_lookahead"] = "adamw"
    lookahead_steps: Count = 6
    lookahead_alpha: Annotated[float, Range(0, 1, above=True)] = 0.8
    schedule: Literal["one_cycle", "published", "published_v1"] = "one_cycle"
    precision: Precision = "float32"
    learning_rate: AtLeast0 = 2e-3
    weight_decay: AtLeast0 = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        pipeline, attack = self.attack_target == "pipeline", self.attack
        for name, default in (("reduction", "mean"), ("eps_mode", "paper"), ("free_bits", 0.0)):
            if pipeline and getattr(self, name) != default:
                raise ValueError(f"{name} {getattr(self, name)!r} needs attack_target='classifier', got 'pipeline'")
        if not attack.eps > 0:
            raise ValueError(f"eps must be above 0, got {attack.eps}: the purifier is always trained on attacks")
        if not pipeline and not (attack.random_start and attack.start_std is None):
            raise ValueError(
                "attack_target='classifier' needs random_start=True and start_std=None: its PGD always starts "
                "uniformly in the ball"
            )
        if not pipeline and (self.joint or self.targets == "classifier"):
            raise ValueError(
                "joint training and targets 'classifier' need attack_target='pipeline': the published loss sees "
                "neither labels nor predictions"
            )
        if self.joint and (self.targets == "classifier" or self.precision == "bfloat16"):
            raise ValueError(
                "joint=True needs targets='labels' and precision 'float32' or 'tf32', because it has no frozen "
                f"classifier, got {self.targets!r} and {self.precision!r}"
            )
        if self.kl_delay_unit == "share" and self.kl_delay >= 1:
            raise ValueError(f"kl_delay must be in [0, 1) as a share of the epochs, got {self.kl_delay}")

    def kl_delay_of(self, epochs: int) -> tuple[float, DelayUnit]:
        """The length of the start of a run without the KL term, and its unit.

        Args:
            epochs: epochs of the whole run.
        """
        if self.kl_delay_unit == "share":
            return self.kl_delay * epochs, "epochs"
        return self.kl_delay, self.kl_delay_unit


# A step asks for it, and it changes with the epoch alone.
@functools.lru_cache(maxsize=8)
def config_in_epoch(config: CarsoConfig, std: tuple[float, ...], epoch: int = 0, epochs: int = 1) -> CarsoConfig:
    """The settings of one epoch, with eps in pixel units.

    Args:
        config: the settings of the training.
        std: the standard deviations that normalize the images, one per channel.
        epoch: the epoch, from 0.
        epochs: epochs of the whole run.
    """
    attack = config.attack.at_epoch(epoch, epochs)
    scale = len(std) / sum(std) if config.eps_mode == "official_code" else 1.0
    return replace(config, attack=replace(attack, eps=attack.eps * scale), eps_mode="paper")


def atom_size(batch_size: int, adversarial_fraction: float, allow_none: bool = False) -> int:
    """Images per attack in a balanced batch: int(batch_size * adversarial_fraction // 4).

    Args:
        batch_size: images of the batch, or of one process's share of it.
        adversarial_fraction: share of them that is attacked.
        allow_none: whether the result may be 0.

    Raises:
        ValueError: the result is 0 and ``allow_none`` is not set. The official TinyImageNet run trained without any
            adversarial example that way.
    """
    atom = int(batch_size * adversarial_fraction // 4)
    if atom == 0 and not allow_none:
        raise ValueError(
            f"adversarial_fraction {adversarial_fraction} of a batch of {batch_size} leaves no adversarial example for "
            "four attacks: give at least 4 / adversarial_fraction images per batch and process"
        )
    return atom
