"""The published trainings of AToP, number by number, each with its source.

The paper's sections on the method could not be read first-hand, so that nearly everything is from the released
notebooks (glin2022/atop, commit 9fa1e91). Lines are counted over the code cells of a notebook; "train.yaml" is
``configs/train.yaml`` of the same repository. The repository has no licence: nothing of it is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...training.attack import TrainingAttack
from ..recipe import Fact, Recipe, named
from .config import AtopConfig
from .defence import Atop
from .generators.deepfill import DeepFillGenerator
from .task import AtopTask


@dataclass(frozen=True)
class AtopRecipe(Recipe):
    """A published AToP training."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, after they were resized."""
        return self["data.image_shape"]

    def config(self, official_code: bool = False) -> AtopConfig:
        """The settings of the training.

        Args:
            official_code: as the notebooks: the classifier is given purified images in [-1, 1] in the cross-entropy,
                and the gradient of the GAN term is cut off.
        """
        attack = AtopConfig.attack if self["method.attack_method"] == "none" else self._attack()
        return AtopConfig(attack=attack, **self.part("method", official_code))

    def _attack(self) -> TrainingAttack:
        # FGSM has no steps; the config wants its own default there
        return TrainingAttack(steps=AtopConfig.attack.steps, **self.part("attack"))

    def defence(
        self, classifier: nn.Module, purifier: nn.Module | None = None, official_code: bool = False, **changes: Any
    ) -> Atop:
        """The defence that is trained.

        Args:
            classifier: takes images of the recipe's size; trained on clean images by the authors.
            purifier: what is trained, with its weights; None for a `DeepFillGenerator` with fresh ones, of the authors'
                size. They begin with one that was trained on Places2.
            official_code: one mask for all images of a batch.
            changes: arguments of `Atop` that take the place of the recipe's.
        """
        purifier = DeepFillGenerator() if purifier is None else purifier
        options = {"image_shape": self.image_shape, **self.part("defence", official_code), **changes}
        return Atop(classifier, purifier, **options)

    def task(self, defence: Atop, official_code: bool = False) -> AtopTask:
        """The training of a defence, for `purify_fast.training.fit`.

        Args:
            defence: what is trained.
            official_code: as for `config`.
        """
        return AtopTask(defence, self.config(official_code))


_NOT_REPRODUCED = (
    "The weights that the authors begin with are not part of this package: a DeepFillv2 generator trained on Places2, "
    "and classifiers trained on clean images.",
    "The authors' classifier has a 3 x 3 stem and no pooling after it, and maps its input by 2x - 1 itself.",
    "With official_code=True there is no discriminator: the notebooks train one, and no gradient of it reaches the "
    "generator (lines 172 and 203).",
    "The order of the images, the noise and the masks are drawn otherwise.",
)
_IMAGENETTE = (
    "Crops are of the centered square of an image. The authors resize the shorter side to 256 and crop at random from "
    "the whole image with a border of 32 pixels.",
)


def _notebook(name: str, notebook: str, title: str, changes: dict[str, Fact], more: tuple[str, ...] = ()) -> AtopRecipe:
    """A notebook, as it differs from cifar-miss-gau-adv.

    Args:
        name: of the recipe, without the method.
        notebook: its file.
        title: of the recipe.
        changes: its own facts.
        more: what else is not reproduced.
    """
    # lines of cifar-miss-gau-adv, which the other notebooks repeat at nearby lines
    at = f"{notebook}:"
    facts = {
        "data.name": Fact("cifar10", "code", f"{at}54"),
        "data.image_shape": Fact((3, 256, 256), "code", f"{at}44"),
        "data.num_classes": Fact(10, "code", f"{at}54"),
        "classifier.name": Fact("ResNet-18 for images of 32 x 32, trained on clean images", "code", f"{at}73"),
        "start.purifier": Fact("DeepFillv2 trained on Places2 (states_pt_places2.pth)", "code", f"{at}69"),
        "defence.transform": Fact("rt2", "code", f"{at}143"),
        "defence.sigma": Fact(0.25, "code", f"{at}127"),
        "defence.block": Fact(32, "code", f"{at}126"),
        "defence.mask_ratio": Fact(0.25, "code", f"{at}128"),
        "defence.samples": Fact(1, "code", f"{at}77"),
        "defence.shared_mask": Fact(False, "inferred", "one draw for each image", official=True),
        "method.attack_method": Fact("fgsm", "code", f"{at}130"),
        "method.attack_target": Fact("classifier", "code", f"{at}130"),
        "attack.eps": Fact(8 / 255, "code", f"{at}130"),
        "method.reconstruction_target": Fact("adversarial", "code", f"{at}141"),
        "method.reconstruction_weight": Fact(1.0, "code", "train.yaml: l1_loss_alpha"),
        "method.cls_weight": Fact(0.05, "code", f"{at}129"),
        "method.cls_delay": Fact(2, "code", f"{at}214"),
        "method.cls_delay_unit": Fact("epochs", "code", f"{at}214"),
        "method.classifier_range": Fact("unit", "inferred", f"{at}81; models/resnet.py maps by 2x - 1", "doubled"),
        "method.gan_grad": Fact(
            True, "second-hand", f"the authors' formula; {at}203 cuts it off (172)", official=False
        ),
        "method.gan_weight": Fact(1.0, "code", "train.yaml: gan_loss_alpha"),
        "method.gan_fake": Fact("refined", "code", f"{at}173"),
        "method.discriminator_width": Fact(64, "code", f"{at}61"),
        "method.precision": Fact("float32", "code", f"{at}96 (no autocast)"),
        "method.schedule": Fact("constant", "code", f"{at}96 (no scheduler)"),
        "method.learning_rate": Fact(1e-4, "code", "train.yaml: g_lr"),
        "method.betas": Fact((0.5, 0.999), "code", "train.yaml: g_beta1, g_beta2"),
        "loop.epochs": Fact(300, "code", f"{at}30"),
        "loop.steps_per_epoch": Fact(625, "code", f"{at}285"),
        "loop.batch_size": Fact(8, "code", f"{at}29"),
        "loop.padding": Fact(0, "code", f"{at}43"),
        "loop.flip": Fact(True, "code", f"{at}45"),
        "loop.seed": Fact(777, "code", f"{at}27"),
        "evaluation.while_training": Fact(
            "FGSM, BIM, EOTPGD and PGD-20 on the classifier alone, then purified, 512 images", "code", f"{at}130-133"
        ),
        "evaluation.released": Fact(
            "AutoAttack standard on generator and classifier", "code", "evaluate.ipynb, cell 2"
        ),
    }
    return AtopRecipe(f"atop/{name}", title, {**facts, **changes}, (*_NOT_REPRODUCED, *more))


def _rt1(notebook: str) -> dict[str, Fact]:
    """What notebooks without noise have otherwise."""
    return {
        "defence.transform": Fact("rt1", "code", f"{notebook}:158"),
        "defence.sigma": Fact(0.0, "code", f"{notebook}:158 (no noise)"),
        "method.cls_delay": Fact(0, "code", f"{notebook}:211"),
        "loop.steps_per_epoch": Fact(101, "code", f"{notebook}:282"),
    }


def _imagenette(notebook: str) -> dict[str, Fact]:
    """What notebooks on ImageNette have otherwise."""
    return {
        "data.name": Fact("imagenette", "code", f"{notebook}:57"),
        "classifier.name": Fact("ResNet-34, trained on clean images", "code", f"{notebook}:84"),
        "loop.padding": Fact(32, "code", f"{notebook}:46 (RandomCrop(256, padding=32))"),
        "loop.drop_last": Fact(True, "code", f"{notebook}:69"),
    }


RECIPES: dict[str, AtopRecipe] = {
    "cifar_rt1": _notebook(
        "cifar_rt1", "cifar-miss-adv.ipynb", "AToP on CIFAR-10 with hidden blocks", _rt1("cifar-miss-adv.ipynb")
    ),
    "cifar_rt2": _notebook(
        "cifar_rt2", "cifar-miss-gau-adv.ipynb", "AToP on CIFAR-10 with noise and hidden blocks", {}
    ),
    "logged": _notebook(
        "logged",
        "0..1 cifar-miss-gau-adv.ipynb",
        "the AToP training whose output the authors kept, which rebuilds clean images",
        {
            "method.reconstruction_target": Fact("clean", "code", "0..1 cifar-miss-gau-adv.ipynb:151"),
            "loop.epochs": Fact(300, "code", "0..1 cifar-miss-gau-adv.ipynb:31; its output ends after 63"),
        },
    ),
    "imagenette": _notebook(
        "imagenette",
        "image-miss-gau-adv.ipynb",
        "AToP on ImageNette with noise and hidden blocks",
        {
            **_imagenette("image-miss-gau-adv.ipynb"),
            "method.cls_weight": Fact(0.1, "code", "image-miss-gau-adv.ipynb:141"),
        },
        _IMAGENETTE,
    ),
    "imagenette_rt1": _notebook(
        "imagenette_rt1",
        "image-miss-adv.ipynb",
        "AToP on ImageNette with hidden blocks",
        {**_rt1("image-miss-adv.ipynb"), **_imagenette("image-miss-adv.ipynb")},
        _IMAGENETTE,
    ),
}


def training(name: str) -> AtopRecipe:
    """A published AToP training.

    Args:
        name: cifar_rt1, cifar_rt2, logged, imagenette or imagenette_rt1, or the same behind "atop/".

    Raises:
        ValueError: another name.
    """
    return named(RECIPES, "atop", name)
