"""The description of CARSO, and the options of its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ..._validation import AtLeast0, Count, Precision, Range, Share, ShareBelow1, check_types
from ...training import FitConfig
from ...training.config import TrainingAttack, check_unused
from ..trainings import FollowsRecipe, Method, TrainPurifier, saved_start

if TYPE_CHECKING:
    from ...data import DataSet
    from ..recipes import Recipe
    from . import CarsoTask


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
        schedule: schedule of the learning rate: "one_cycle" (own) or "published"; see `carso_published`.
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
    schedule: Literal["one_cycle", "published"] = "one_cycle"
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


# -- the description of CARSO, and the options of its training ---------------------------------------------------------

_SIZES = ("layers", "cond_dim", "latent_dim", "samples")


@dataclass(frozen=True)
class TrainCarso(FollowsRecipe, TrainPurifier):
    """Train CARSO's purifier on a saved classifier, with the paper's objective or through the pipeline.

    An interrupted training continues if the same command is run again.

    Args:
        init: Folder of a saved CARSO from which the training starts, such as to fine-tune it. It sets the sizes.
        layers: Names of the classifier's layers whose outputs form the representation. Default, for small_cnn only:
            conv2, conv4 and hidden.
        cond_dim: Size of the condition, the vector to which the representation is compressed.
        latent_dim: Size of the random latent vector of each sample.
        samples: Number of reconstructions that are classified for each image.
        decoder_width: Number of channels in the decoder's last hidden layer. Earlier layers have up to 8 times as many.
    """

    called: ClassVar[str] = "train carso"
    no_effect: ClassVar = {
        ("beside", "init"): (*_SIZES, "decoder_width"),
        ("beside", "recipe"): ("init", "decoder_width"),
    }

    out: Path = Path("runs/carso")
    init: Path | None = None
    layers: tuple[str, ...] = ()
    cond_dim: int = 64
    latent_dim: int = 8
    samples: int = 8
    decoder_width: int = 8
    method: CarsoConfig = field(default_factory=CarsoConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=40, batch_size=64))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        return {name: recipe[f"defence.{name}"] for name in _SIZES}

    def task(self, images: DataSet, classifier: Any) -> CarsoTask:
        from ..._settings import weights_fingerprint
        from ...data import statistics
        from ...models.classifiers import SmallCNN
        from ...models.layers import layers_missing
        from ..recipes import recipe
        from . import Carso, CarsoTask

        if self.init is not None:
            defence = saved_start(Carso, self.init, classifier)
            return CarsoTask(defence, self.method, weights_fingerprint(defence))
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        if not self.layers:
            if not isinstance(classifier, SmallCNN):
                advice = "name modules whose outputs form the representation"
                raise layers_missing(classifier, images.image_shape, advice)
            sizes["layers"] = ("conv2", "conv4", "hidden")
        if self.recipe is None:
            sizes |= {"image_shape": images.image_shape, "decoder_width": self.decoder_width}
            return CarsoTask(Carso(classifier, **sizes), self.method)
        published = recipe(self.recipe, "carso")
        same = images.name == published["data.name"] and images.image_shape[0] == published.image_shape[0]
        mean, std = (None, None) if same else statistics(images.x_train)
        own = published.for_data(images.image_shape, images.num_classes, mean=mean, std=std)
        return CarsoTask(own.defence(classifier, **sizes), self.method)


METHOD = Method((TrainCarso,), defence="Carso", recipes=True)
