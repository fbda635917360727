"""The settings of CARSO's training, with their sources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ..._validation import AtLeast0, Count, Precision, Range, Share, ShareBelow1, check_types
from ...training.config import TrainingAttack, check_unused


@dataclass(frozen=True)
class CarsoConfig:
    """The settings of the training of CARSO's purifier. "Paper" is arXiv 2306.06081; "own" is this package's choice.

    attack_target chooses between two trainings. With "classifier", train_samples and reconstruction_weight have no
    effect, and targets must have its default. With "pipeline", kl_delay, beta and adversarial_fraction have no effect,
    and reduction and eps_mode must have their defaults.

    Args:
        attack_target: target of the attacks on training examples: "classifier" (paper), or "pipeline", the whole
            defence with exact gradients (own).
        attack: the attack. Paper: linf, eps 8/255 for color images and 0.3 for MNIST, 40 steps of length 0.01 (chosen
            for eps 8/255). The default alpha=None is own. With "classifier", half of the attacked images have half of
            eps (paper); a given alpha is the same for all attacked images.
        eps_mode: "paper" uses eps unchanged. "official_code" divides eps by the mean of the defence's std, because the
            official code attacks unnormalized images with the radius for normalized images.
        adversarial_fraction: share of each batch that is attacked, divided evenly among four attacks (paper: 0.5, on
            CIFAR-10).
        allow_no_adversarial: whether to train even if adversarial_fraction of a batch is less than four images, so that
            no image is attacked. This happens in the official TinyImageNet run.
        kl_delay: share of the epochs, at the start of the run, in which the KL term has weight 0 (paper: 0.125).
            Afterwards its weight rises linearly, for a third of this length. Both are rounded up to whole epochs. The
            rise begins at 0: with a delay of 1 epoch, the weight is 0 in epochs 1 and 2, and full from epoch 3. With
            kl_delay 0, the weight is full from the first step.
        beta: final weight of the KL term (paper: 1).
        train_samples: K, reconstructions per image in the training through the pipeline.
        targets: targets for the K predictions of an attacked image in the training through the pipeline. "labels" uses
            cross-entropy (own). "classifier" uses the divergence from the frozen classifier's probabilities for the
            clean image (Goldblum et al., AAAI 2020, arXiv 1905.09747).
        reconstruction_weight: weight of the reconstruction term in the training through the pipeline (own: 0.02).
        reduction: reduction of the loss over the batch, "mean" (own) or "sum" (paper).
        optimizer: "adamw" (own), or "radam_lookahead", RAdam within Lookahead (paper), whose slow weights are the
            trained weights.
        lookahead_steps: fast steps per slow step of Lookahead (paper: 6).
        lookahead_alpha: length of Lookahead's slow step (paper: 0.8).
        schedule: schedule of the learning rate: "one_cycle" (own), "published" or "published_v1"; see `carso_published`
            and `carso_v1_published`.
        precision: "float32", with full IEEE precision on a GPU too (the official code's convolutions use TF32 there);
            "tf32" (own), which on a GPU rounds the factors of products to ten bits of mantissa during the training; or
            "bfloat16", which computes with a frozen copy of the classifier (own).
        learning_rate: highest learning rate of the schedule (paper: 1e-4 times the batch size of one process, for the
            reduction "sum").
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a setting is out of range or excludes another setting; the message names it.
    """

    attack_target: Literal["classifier", "pipeline"] = "classifier"
    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=40)
    eps_mode: Literal["paper", "official_code"] = "paper"
    adversarial_fraction: Share = 0.5
    allow_no_adversarial: bool = False
    kl_delay: ShareBelow1 = 0.125
    beta: AtLeast0 = 1.0
    train_samples: Count = 1
    targets: Literal["labels", "classifier"] = "labels"
    reconstruction_weight: AtLeast0 = 0.02
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
        if self.attack_target == "pipeline":
            check_unused(self, type(self), ("reduction", "eps_mode"), "attack_target='classifier'")
        else:
            check_unused(self, type(self), ("targets",), "attack_target='pipeline'")
            check_unused(self.attack, type(self).attack, ("random_start", "start_std"), "attack_target='pipeline'")
        if not self.attack.eps > 0:
            raise ValueError("eps must be above 0, got 0: the purifier is always trained on attacks")


def config_in_epoch(config: CarsoConfig, std: tuple[float, ...], epoch: int = 0, epochs: int = 1) -> CarsoConfig:
    """Return the settings of an epoch, counted from 0, with eps in image units. ``std`` normalizes the images."""
    attack = config.attack.at_epoch(epoch, epochs)
    scale = len(std) / sum(std) if config.eps_mode == "official_code" else 1.0
    return replace(config, attack=replace(attack, eps=attack.eps * scale), eps_mode="paper")


def atom_size(batch_size: int, adversarial_fraction: float, allow_none: bool = False) -> int:
    """Return the number of images for each of the four attacks: int(batch_size * adversarial_fraction // 4)."""
    atom = int(batch_size * adversarial_fraction // 4)
    if atom == 0 and not allow_none:
        raise ValueError(f"adversarial_fraction {adversarial_fraction} of {batch_size} images is too few for 4 attacks")
    return atom


def carso_published(epoch: int, epochs: int, peak: float) -> float:
    """Return CARSO's learning rate in ``epoch``, counted from 0 (arXiv 2306.06081, official code).

    The rate rises linearly from 5e-9 to ``peak`` over int(epochs / 8) epochs, but at least 3. It remains at ``peak``
    for int(epochs / 8) epochs, but at least 1. Then it falls linearly to 1.25e-4 ``peak`` over the remaining epochs,
    but at least 3. The official peak is 1e-4 times the batch size of one process.
    """
    rise, flat = max(3, int(epochs / 8)), max(1, int(epochs / 8))
    fall = max(3, epochs - 2 * int(epochs / 8))
    if epoch < rise:
        return 5e-9 + (peak - 5e-9) * epoch / rise
    return peak * (1 - (1 - 1.25e-4) * min(1.0, max(0, epoch - rise - flat) / fall))


def carso_v1_published(epoch: int, epochs: int, peak: float) -> float:
    """Return version 1's rate: linear from 5e-9 to ``peak`` in int(epochs / 3) epochs, and linear back to 5e-9."""
    rise = max(1, int(epochs / 3))
    position = epoch / rise if epoch <= rise else (epochs - epoch) / max(1, epochs - rise)
    return 5e-9 + (peak - 5e-9) * position
