"""The commands that train a classifier or the network of a method.

Their settings are the dataclasses of the methods and of `fit`. `METHODS` has the class of each method's defence.
"""

from __future__ import annotations

import shlex
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .._validation import Count, Share
from ..methods.arrest import ArrestConfig
from ..methods.atop import AtopConfig
from ..methods.carso import CarsoConfig
from ..methods.diffusion.config import DiffusionConfig
from ..training import ClassifierConfig, FitConfig
from .command import DataCommand
from .run_file import values, write_run_file
from .saved_models import accuracy_text, is_named, named_classifier, refuse_other_images, trained_classifier

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Self

    from ..data import DataSet
    from ..methods.atop import AtopTask
    from ..methods.carso import CarsoTask
    from ..methods.publication import Recipe
    from ..methods.purifier_task import PurifierTask
    from ..training import BankConfig, Task

#: The largest number of held-out images on which a trained defence is tested.
TESTED = 512
#: The options of CARSO, and of AToP's generator and transform.
_CARSO_SIZES = ("layers", "cond_dim", "latent_dim", "samples", "decoder_width")
_GENERATOR = ("purifier", "width", "residual", "weights")
_TRANSFORM = ("transform", "sigma", "block", "mask_ratio", "num_passes", "samples", "aggregation", "shared_mask")


@dataclass(frozen=True)
class Training(DataCommand):
    """A command that trains a model.

    Args:
        out: Folder of the run, for the checkpoint, the log, the options and the trained model.
    """

    out: Path = Path("runs")
    method: Any = None
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=1))

    @classmethod
    def trained(cls) -> str:
        """The last word of the command, which for a method is its name in `purify_fast.methods.recipes.METHODS`."""
        return cls.called.split()[-1]

    @abstractmethod
    def task(self, images: DataSet) -> Task:
        """Make the task of the training: the model with its initial weights, and its loss."""

    def save(self, trained: Any, images: DataSet) -> None:
        """Save the trained classifier."""
        from ..training import save_classifier

        save_classifier(trained, self.out, images.classes)

    def tested(self, trained: Any, images: DataSet) -> str:
        """The accuracy on the held-out images, which are not attacked."""
        share = accuracy_text(trained, images.x_test, images.y_test, self.loop.batch_size)
        return f"accuracy without an attack: {share}"

    def bank_config(self) -> BankConfig | None:
        """The settings of the bank of adversarial images; None for a training without a bank."""
        return None

    def run(self) -> None:
        from .._process import processes
        from ..training import fit, summary

        images, title = self.load_data(), self.trained()
        task = self.task(images)
        bank = self.bank_config()
        last = fit(task, images.x_train, images.y_train, self.loop, folder=self.out, title=title, bank=bank)
        if processes()[0] == 0:
            self.save(task.result, images)
            write_run_file(self, self.out)
            print(summary(last))
            if text := self.tested(task.result, images):
                print(text)
            given = {"--data": (self.data,), "--size": self.size or ()}
            given |= {"--num-classes": (self.num_classes,), "--data-root": (self.data_root,)}
            words = [str(word) for name, own in given.items() if any(own) for word in (name, *own)]
            attack = shlex.join(["purify-fast", "evaluate", str(self.out), *words])
            print(f"saved to {self.out}" + (f"; attack it with: {attack}" if values(self).get("eps", 0) > 0 else ""))


@dataclass(frozen=True)
class FollowsRecipe(Training):
    """A command that can train by a recipe, which is the settings of a published training.

    Args:
        recipe: Name of a published training of this method (see `purify-fast recipe`), whose settings become the
            defaults of this command.
        official_code: With --recipe: repeat also the known mistakes of the authors' code (`purify-fast recipe NAME`).
    """

    no_effect: ClassVar = {("without", "recipe"): ("official_code",)}

    recipe: str | None = None
    official_code: bool = False

    @classmethod
    def of_recipe(cls, name: str, official_code: bool, batch_size: int | None = None) -> Self:
        from ..methods.recipes import recipe

        published = recipe(name, cls.trained())
        if batch_size is not None:
            published = published.for_batch(batch_size)
        options = {"method": published.config(official_code), "loop": published.loop(official_code)}
        options |= {"recipe": published.name, "official_code": official_code, "data": published["data.name"]}
        return cls(**options, **cls.sizes_of(published, official_code))

    @staticmethod
    def sizes_of(recipe: Recipe, official_code: bool) -> dict[str, Any]:
        """The options of this command that a recipe sets, in addition to the fields `method` and `loop`."""
        return {}

    def saved_start(self, folder: Path, classifier: nn.Module, **options: Any) -> Any:
        """Load a defence of this method, from which the training starts, with the options of `load_defence`."""
        from ..methods.loading import load_defence
        from ..methods.recipes import METHODS

        defence, kind = load_defence(folder, classifier, **options), METHODS[self.trained()].defence
        if kind is None or not isinstance(defence, kind):
            other = type(defence).__name__
            raise ValueError(f"{folder} contains no defence of the method {self.trained()}, but a {other}")
        return defence


@dataclass(frozen=True)
class OnClassifier(Training):
    """A command whose training starts from a trained classifier.

    Args:
        classifier: The classifier: a folder that `train classifier` or `train arrest` wrote, or zoo:NAME, or a name
            such as torchvision:resnet18, timm:resnet18 or package.module:function (your function).
        classifier_weights: Weights of a classifier that is given by name: a .safetensors or .pth file, from which only
            tensors are read (its moving average, if there is one).
        mean: With --classifier-weights: mean by which the images in [0, 1] were normalized in their training; a number,
            or one for each channel, such as 0.485 0.456 0.406. Default: 0.
        std: With --mean: standard deviation by which the images were then divided. Default: 1.
    """

    no_effect: ClassVar = {("without", "classifier_weights"): ("mean", "std")}

    classifier: str = "runs/classifier"
    classifier_weights: str | None = None
    mean: tuple[Share, ...] = ()
    std: tuple[Share, ...] = ()

    def given_classifier(self, images: DataSet) -> nn.Module:
        """Load the classifier, and print how it normalizes images, and its accuracy on at most 1,000 images."""
        from .._process import processes
        from ..data import balanced_subset

        model = trained_classifier(self.classifier, self.classifier_weights, images, self.mean, self.std)
        if processes()[0] == 0:
            facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
            mean, std = (" ".join(f"{value:.4g}" for value in facts.get(name, ())) for name in ("mean", "std"))
            how = f"mean {mean}, std {std}" if mean else "by its own code"
            some = balanced_subset(images.x_test, images.y_test, 1000, seed=0, num_classes=images.num_classes)
            share = accuracy_text(model, some.x, some.y, self.loop.batch_size)
            name = " with ".join(filter(None, (self.classifier, self.classifier_weights)))
            print(f"classifier {name}: normalization of images in [0, 1]: {how}")
            print(f"its accuracy without an attack: {share}", flush=True)
        return model


@dataclass(frozen=True)
class TrainClassifier(Training):
    """Train a classifier: on clean images (eps 0), or adversarially with PGD.

    An interrupted training continues if the same command is run again.

    Args:
        model: Network of the classifier: small_cnn, preact_resnet18, wide_resnet, fully_connected, torchvision:NAME,
            timm:NAME or package.module:function.
        width: Number of channels of the network's first stage. Default: 16 for small_cnn, 64 for preact_resnet18. For
            wide_resnet it is the factor of all widths, by default 10.
        depth: Number of layers of a wide_resnet. Default: 28.
        activation: Activation of a wide_resnet. Default: silu.
    """

    called: ClassVar[str] = "train classifier"

    out: Path = Path("runs/classifier")
    model: str = "small_cnn"
    width: int | None = None
    depth: int | None = None
    activation: Literal["silu", "relu"] | None = None
    method: ClassifierConfig = field(default_factory=ClassifierConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=30))

    def task(self, images: DataSet) -> Task:
        import torch

        from ..training import ClassifierTask

        torch.manual_seed(self.loop.seed)
        return ClassifierTask(self.fresh(images), self.method)

    def fresh(self, images: DataSet) -> nn.Module:
        """Make the classifier with random weights on the device of the images."""
        from ..data import statistics
        from ..models.classifiers import CLASSIFIERS, build_classifier

        sizes: dict[str, Any] = {"width": self.width, "depth": self.depth, "activation": self.activation}
        if is_named(self.model):
            if any(sizes.values()):
                raise ValueError(f"--width, --depth and --activation are not for --model {self.model}")
            return named_classifier(self.model, None, images)
        if self.model not in CLASSIFIERS:
            others = "torchvision:NAME such as torchvision:resnet18, timm:NAME or package.module:function"
            raise ValueError(f"--model must be {', '.join(CLASSIFIERS)}, {others}, got {self.model!r}")
        mean, std = statistics(images.x_train)
        model = build_classifier(self.model, images.image_shape, images.num_classes, mean=mean, std=std, **sizes)
        return model.to(images.y_train.device)


@dataclass(frozen=True)
class TrainArrest(FollowsRecipe, OnClassifier):
    """Finetune a standard classifier adversarially by ARREST, so that its representation changes little.

    The result is a classifier, which `evaluate` can attack, and which `train carso` and `train atop` can use. An
    interrupted training continues if the same command is run again.

    Args:
        layers: Names of the layers whose outputs are the representation. Default: the last map before pooling.
    """

    called: ClassVar[str] = "train arrest"

    out: Path = Path("runs/arrest")
    classifier: str = "runs/standard"
    layers: tuple[str, ...] = ()
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    def task(self, images: DataSet) -> Task:
        from ..methods.arrest import ArrestTask

        return ArrestTask(self.given_classifier(images), self.method, images.image_shape, self.layers or None)


@dataclass(frozen=True)
class TrainPurifier(OnClassifier):
    """A command that trains a purifier for a classifier that is already trained."""

    @abstractmethod
    def task_on(self, classifier: nn.Module, images: DataSet) -> PurifierTask[Any]:
        """Make the task that trains the defence."""

    def task(self, images: DataSet) -> PurifierTask[Any]:
        import torch

        classifier = self.given_classifier(images)
        torch.manual_seed(self.loop.seed)
        task = self.task_on(classifier, images)
        refuse_other_images(task.defence, images, "the purifier")
        return task

    def save(self, trained: Any, images: DataSet) -> None:
        from ..training import save_classifier

        trained.save(self.out)
        save_classifier(trained.classifier, self.out / "classifier", images.classes)

    def tested(self, trained: Any, images: DataSet) -> str:
        share = accuracy_text(trained, images.x_test, images.y_test, self.loop.batch_size, most=TESTED)
        return f"accuracy of the defence without an attack: {share}"


@dataclass(frozen=True)
class KeepsAttacks(Training):
    """A command that can save its attacked images in a file, called adversarial bank, and train on them again.

    Args:
        bank: Save up to this number of attacked versions ("variants") of each image in a file, and train on them again
            in later epochs instead of attacking. Needs the paper's objective, which attacks only the classifier.
            Default: attack in every step.
        bank_refresh: With --bank: share of the adversarial images that are attacked again, to replace the oldest.
        bank_folder: With --bank: folder of the file, also for later runs. Default: banks in the folder of caches.
    """

    no_effect: ClassVar = {("without", "bank"): ("bank_refresh", "bank_folder")}

    bank: Count | None = None
    bank_refresh: Share = 0.05
    bank_folder: Path | None = None

    def bank_config(self) -> BankConfig | None:
        from ..training import BankConfig

        return None if self.bank is None else BankConfig(self.bank, self.bank_refresh, self.bank_folder)


@dataclass(frozen=True)
class TrainCarso(KeepsAttacks, FollowsRecipe, TrainPurifier):
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
    no_effect: ClassVar = {("beside", "init"): _CARSO_SIZES, ("beside", "recipe"): ("init", "decoder_width")}

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
        return {name: recipe[f"defence.{name}"] for name in _CARSO_SIZES if name != "decoder_width"}

    def task_on(self, classifier: nn.Module, images: DataSet) -> CarsoTask:
        from .._tensors import weights_fingerprint
        from ..data import statistics
        from ..methods.carso import Carso, CarsoTask
        from ..methods.recipes import recipe
        from ..models.classifiers import SmallCNN
        from ..models.layer_names import layers_missing

        if self.init is not None:
            defence = self.saved_start(self.init, classifier)
            return CarsoTask(defence, self.method, weights_fingerprint(defence))
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _CARSO_SIZES}
        if not self.layers:
            if not isinstance(classifier, SmallCNN):
                advice = "name modules whose outputs form the representation"
                raise layers_missing(classifier, images.image_shape, advice)
            sizes["layers"] = ("conv2", "conv4", "hidden")
        if self.recipe is None:
            return CarsoTask(Carso(classifier, image_shape=images.image_shape, **sizes), self.method)
        del sizes["decoder_width"]
        published = recipe(self.recipe, "carso")
        same = images.name == published["data.name"] and images.image_shape[0] == published.image_shape[0]
        mean, std = (None, None) if same else statistics(images.x_train)
        own = published.for_data(images.image_shape, images.num_classes, mean=mean, std=std)
        return CarsoTask(own.defence(classifier, **sizes), self.method)


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

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask, DeepFillGenerator
        from ..methods.atop.purifier import build_purifier

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
class TrainAtop(KeepsAttacks, FollowsRecipe, TrainGenerator):
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

    def task_on(self, classifier: nn.Module, images: DataSet) -> AtopTask:
        from .._tensors import weights_fingerprint
        from ..methods.atop import Atop, AtopTask

        if self.init is None:
            return super().task_on(classifier, images)
        if not self.init.is_dir():
            advice = "run `purify-fast train generator` first, or give its folder as --init; None: random weights"
            raise FileNotFoundError(f"--init: {self.init} is missing: {advice}")
        # Do not check that the classifier is the same, because the pre-training did not depend on its classifier.
        defence = self.saved_start(self.init, classifier, check=False)
        if self.recipe is not None:
            # The recipe sets the transform. Only the purifier is taken from the folder.
            defence = Atop(classifier, defence.purifier.module, images.image_shape, **self.transform_options())
        return AtopTask(defence, self.method, weights_fingerprint(defence.purifier))


@dataclass(frozen=True)
class TrainDiffusion(Training):
    """Train a denoiser for a diffusion purifier on clean images.

    No classifier is needed: `evaluate OUT --classifier FOLDER` combines both. An interrupted training continues if the
    same command is run again.

    Args:
        width: Number of channels of the U-Net at full size: a multiple of 16, or an even number below 16.
        patch: Side of the squares of pixels that become channels of the U-Net. 2 takes a quarter of the operations of
            1.
        attention: Use attention over all positions at the lowest level of the U-Net.
    """

    called: ClassVar[str] = "train diffusion"

    out: Path = Path("runs/denoiser")
    width: int = 32
    patch: int = 1
    attention: bool = True
    method: DiffusionConfig = field(default_factory=DiffusionConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=100, batch_size=64))

    def task(self, images: DataSet) -> Task:
        import torch

        from ..methods.diffusion import DiffusionTask
        from ..models import UNet

        torch.manual_seed(self.loop.seed)
        network = UNet(images.image_shape[0], self.width, patch=self.patch, attention=self.attention)
        return DiffusionTask(network.to(images.y_train.device), self.method)

    def save(self, trained: Any, images: DataSet) -> None:
        from ..methods.diffusion import save_denoiser

        process = {"schedule": self.method.noise_schedule, "prediction": self.method.prediction}
        save_denoiser(trained, self.out, images.image_shape, process, last_time=self.method.last_time)

    def tested(self, trained: Any, images: DataSet) -> str:
        return ""
