"""The description of AToP, and the options of its two trainings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..._validation import AtLeast0, Count, DelayUnit, Precision, Range, ShareBelow1, check_types
from ...training import FitConfig
from ...training.config import TrainingAttack, check_unused
from ..trainings import FollowsRecipe, Method, TrainPurifier, saved_start

if TYPE_CHECKING:
    from ...data import DataSet
    from ..recipes import Recipe
    from . import AtopTask


@dataclass(frozen=True)
class AtopConfig:
    """The settings of the training of AToP's purifier; `purify_fast.methods.atop.task` has the authors' settings.

    "Official" is the official code of arXiv 2401.16352; "own" is this package's choice.

    Args:
        attack_method: "fgsm" (official: one step, no random start), "pgd", or "none", as in pre-training.
        attack_target: target of the attacks: "classifier" (official), or "pipeline", the whole defence with exact
            gradients (own).
        attack: the attack. Its norm, eps and eps_warmup set the ball (official: linf, eps 8/255). Its other settings
            are for PGD, and must have their defaults if attack_method is not "pgd".
        reconstruction_target: image that the purifier learns to rebuild. "adversarial": the adversarial image, from its
            transform (released notebooks; one pass). "clean": the clean image, from its transform (the authors' logged
            run). The cross-entropy then needs a second pass, over the adversarial image with the same noise and mask.
        cls_weight: weight lambda of the classifier's cross-entropy (official: 0.05; 0.1 on ImageNette).
        cls_delay: length of the first part of the training, in which the cross-entropy has weight 0 (official: 2
            epochs; the notebooks end an epoch after 625 steps of 8 images each).
        cls_delay_unit: unit of cls_delay: "epochs", "steps" or "images".
        classifier_range: range of the purified images in the cross-entropy. "unit": [0, 1], as in predictions.
            "doubled": [-1, 1], as in the released notebooks, although the classifier there was trained on [0, 1].
        reconstruction_weight: weight of the L1 terms (official: 1).
        gan_weight: weight of the purifier's GAN term, L_G (official: 1).
        discriminator_width: channels of the discriminator's first layer (official: 64).
        gan_grad: whether L_G trains the purifier, as in the paper's formula. The official code cuts off L_G's gradient,
            so the discriminator has no effect. With False, there is no discriminator.
        gan_fake: fake images in the discriminator's loss. "refined": the refined images (fine-tuning). "pasted": the
            refined images in the hidden blocks, and the transformed images elsewhere (pre-training).
        precision: "float32" (official), with full IEEE precision on a GPU too; "tf32" (own), which on a GPU rounds the
            factors of products to ten bits of mantissa during the training; or "bfloat16", which computes with a frozen
            copy of the classifier (own).
        schedule: schedule of the learning rate: "constant" (official) or "one_cycle" (own).
        learning_rate: learning rate of Adam (official: 1e-4).
        betas: betas of Adam (official: 0.5, 0.999).

    Raises:
        ValueError: a setting is out of range or would have no effect; the message names it.
    """

    attack_method: Literal["fgsm", "pgd", "none"] = "fgsm"
    attack_target: Literal["classifier", "pipeline"] = "classifier"
    attack: TrainingAttack = TrainingAttack(eps=8 / 255, steps=10)
    reconstruction_target: Literal["adversarial", "clean"] = "adversarial"
    cls_weight: AtLeast0 = 0.05
    cls_delay: Annotated[int, Range(0)] = 10_000
    cls_delay_unit: DelayUnit = "images"
    classifier_range: Literal["unit", "doubled"] = "unit"
    reconstruction_weight: AtLeast0 = 1.0
    gan_weight: AtLeast0 = 1.0
    discriminator_width: Count = 64
    gan_grad: bool = False
    gan_fake: Literal["refined", "pasted"] = "refined"
    precision: Precision = "float32"
    schedule: Literal["constant", "one_cycle"] = "constant"
    learning_rate: AtLeast0 = 1e-4
    betas: tuple[ShareBelow1, ShareBelow1] = (0.5, 0.999)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.gan_grad:
            check_unused(self, type(self), ("gan_weight", "discriminator_width", "gan_fake"), "gan_grad=True")
        if self.attack_method != "pgd":
            of_pgd = ("steps", "alpha", "relative_alpha", "random_start", "start_std")
            check_unused(self.attack, type(self).attack, of_pgd, "attack_method='pgd'")
        if self.attack_method == "none":
            check_unused(self, type(self), ("attack_target",), "an attack_method")
        elif not self.attack.eps > 0:
            raise ValueError("eps must be above 0, got 0: to train without attacks, set attack_method='none'")

    @classmethod
    def pretraining(cls, **changes: Any) -> AtopConfig:
        """Return settings for the pre-training of a generator on clean images, with changed fields ``changes``.

        It has a hinge GAN loss and an L1 loss with weight 1, and no cross-entropy, as DeepFillv2's training in AToP's
        repository (`train see in Finetuning-AToP.py`, `configs/train.yaml`), but with the defence's transform.
        """
        settings = {"attack_method": "none", "reconstruction_target": "clean", "cls_weight": 0.0, "gan_grad": True}
        return cls(**{**settings, "gan_fake": "pasted", **changes})


# -- the description of AToP, and the options of its two trainings -----------------------------------------------------

_GENERATOR = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class TrainGenerator(TrainPurifier):
    """Pre-train AToP's purifier on clean images, with a hinge GAN loss and an L1 loss.

    An interrupted training continues if the same command is run again.

    Args:
        purifier: Network of the purifier. deepfill was designed for images of 256 x 256, and needs sides that are
            multiples of 8. For sides below 128, use small_generator: deepfill's attention then has few keys.
        width: Width of the purifier's network. Default: 8 for small_generator, 48 for deepfill.
        residual: Let a small_generator predict a correction of the image instead of a new image.
        weights: Checkpoint of deepfillv2-pytorch from which a deepfill starts, whatever --purifier names. Only tensors
            are read from it.
        transform: Random transform before the purifier. rt1 hides blocks. rt2 adds noise and hides blocks. rt3 adds
            noise and makes several passes, so that every block is hidden once.
        sigma: Standard deviation of the noise, in image units.
        block: Side of a block in pixels. Default: the divisor of the image's sides nearest to an eighth of its height.
        mask_ratio: Share of the blocks that rt1 and rt2 hide.
        num_passes: Number of passes of rt3.
        samples: Number of draws of noise and mask per prediction.
        aggregation: Combination of the draws: mean (of the logits), or mean_softmax (logarithm of the mean softmax).
        shared_mask: Draw a single mask for the whole batch, like the official code.
    """

    called: ClassVar[str] = "train generator"
    no_effect: ClassVar = {("beside", "weights"): ("width", "residual")}

    out: Path = Path("runs/generator")
    purifier: Literal["deepfill", "small_generator"] = "small_generator"
    width: int | None = None
    residual: bool = False
    weights: Path | None = None
    transform: Literal["rt1", "rt2", "rt3"] = "rt2"
    sigma: float = 0.25
    block: int | None = None
    mask_ratio: float = 0.25
    num_passes: int = 4
    samples: int = 1
    aggregation: Literal["mean", "mean_softmax"] = "mean"
    shared_mask: bool = False
    method: AtopConfig = field(default_factory=AtopConfig.pretraining)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=16))

    def task(self, images: DataSet, classifier: Any) -> AtopTask:
        from ..._settings import weights_fingerprint
        from . import Atop, AtopTask, DeepFillGenerator, build_purifier

        if self.weights is None:
            purifier = build_purifier(self.purifier, images.image_shape[0], width=self.width, residual=self.residual)
        else:
            purifier = DeepFillGenerator.from_official(self.weights)
        origin = "scratch" if self.weights is None else weights_fingerprint(purifier)
        return AtopTask(Atop(classifier, purifier, images.image_shape, **self.transform_options()), self.method, origin)

    def transform_options(self) -> dict[str, Any]:
        """The options of the transform, by their names in `Atop`."""
        return {name: getattr(self, name) for name in _TRANSFORM}


@dataclass(frozen=True)
class TrainAtop(FollowsRecipe, TrainGenerator):
    """Fine-tune AToP's purifier for a frozen classifier, with the paper's objective or through the pipeline.

    An interrupted training continues if the same command is run again.

    Args:
        init: Folder that `train generator` or `train atop` wrote, with its network and transform. None: random weights.
    """

    called: ClassVar[str] = "train atop"
    no_effect: ClassVar = {("beside", "init"): _GENERATOR + _TRANSFORM}

    out: Path = Path("runs/atop")
    init: Path | None = Path("runs/generator")
    method: AtopConfig = field(default_factory=AtopConfig)

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        # The authors start from weights that were trained on Places2. The user passes these weights as --weights.
        # The default side of a block is the recipe's, for images of the recipe's size.
        options = {"size": recipe.image_shape[1:], "purifier": "deepfill", "init": None}
        return options | recipe.part("defence", official_code) | {"block": None}

    def task(self, images: DataSet, classifier: Any) -> AtopTask:
        from ..._settings import weights_fingerprint
        from . import Atop, AtopTask

        if self.init is None:
            return super().task(images, classifier)
        if not self.init.is_dir():
            advice = "run `purify-fast train generator` first, or give its folder as --init; None: random weights"
            raise FileNotFoundError(f"--init: {self.init} is missing: {advice}")
        # Do not check that the classifier is the same, because the pre-training did not depend on its classifier.
        defence = saved_start(Atop, self.init, classifier, check=False)
        if self.recipe is not None:
            # The recipe sets the transform. Only the purifier is taken from the folder.
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))


METHOD = Method((TrainGenerator, TrainAtop), defence="Atop", recipes=True)
