"""The published trainings of AToP, number by number, each with its source.

The paper's sections on the method could not be read first-hand, so that nearly everything is from the released
notebooks (glin2022/atop, commit 9fa1e91). Lines are counted over the code cells of a notebook; "train.yaml" is
``configs/train.yaml`` of the same repository. The repository has no licence: nothing of it is copied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...training.config import TrainingAttack
from ..recipe import Fact, Recipe
from .config import AtopConfig
from .defence import Atop
from .generators.deepfill import DeepFillGenerator
from .task import AtopTask


@dataclass(frozen=True)
class AtopRecipe(Recipe):
    """A published AToP training."""

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
    "generator.",
    "The order of the images, the noise and the masks are drawn otherwise.",
)
_IMAGENETTE = (
    "Crops are of the centered square of an image. The authors resize the shorter side to 256 and crop at random from "
    "the whole image with a border of 32 pixels.",
)


#: The notebooks of Finetuning-AToP that recipes follow, and where each has what a recipe says, by the lines of all its
#: code cells together, at commit 9fa1e91; 0 where a notebook has no such line.
_NOTEBOOKS = (
    "cifar-miss-gau-adv.ipynb",
    "cifar-miss-adv.ipynb",
    "0..1 cifar-miss-gau-adv.ipynb",
    "image-miss-gau-adv.ipynb",
    "image-miss-adv.ipynb",
)
_LINES = {
    "data": (54, 54, 56, 57, 58),
    "size": (44, 44, 46, 44, 45),
    "classifier": (73, 73, 75, 82, 84),
    "start": (69, 69, 71, 78, 80),
    "transform": (143, 158, 152, 155, 168),
    "block": (126, 127, 136, 138, 137),
    "sigma": (127, 158, 137, 139, 168),
    "ratio": (128, 129, 138, 140, 139),
    "samples": (77, 77, 79, 86, 88),
    "mask": (152, 147, 162, 164, 157),
    "attack": (130, 131, 140, 142, 141),
    "target": (141, 142, 151, 153, 152),
    "lambda": (129, 130, 139, 141, 140),
    "delay": (214, 211, 228, 227, 222),
    "range": (81, 81, 83, 90, 92),
    "detached": (172, 169, 183, 184, 179),
    "fake": (173, 170, 184, 185, 180),
    "deceived": (203, 200, 217, 216, 211),
    "discriminator": (61, 61, 63, 71, 72),
    "optimizer": (96, 96, 99, 105, 107),
    "steps": (285, 282, 299, 298, 293),
    "batch": (29, 29, 30, 29, 29),
    "epochs": (30, 30, 31, 30, 30),
    "seed": (27, 27, 28, 27, 27),
    "augmentation": (43, 43, 45, 45, 46),
    "flip": (45, 45, 47, 46, 47),
    "loader": (0, 0, 0, 68, 69),
}


def _at(notebook: str, what: str) -> str:
    """The notebook and the line of something in it."""
    return f"{notebook}:{_LINES[what][_NOTEBOOKS.index(notebook)]}"


def _evaluations(notebook: str) -> dict[str, Fact]:
    """How the authors attack, in a notebook and in the released evaluation."""
    attacked = "FGSM, BIM, EOTPGD and PGD-20 on the classifier alone, then purified, 512 images"
    cell = "evaluate.ipynb, second code cell with content, lines 59-102 and 144"
    return {
        "evaluation.while_training": Fact(attacked, "code", _at(notebook, "attack") + " and after"),
        "evaluation.released": Fact("AutoAttack standard on generator and classifier", "code", cell),
    }


def _notebook(name: str, notebook: str, title: str, changes: dict[str, Fact], more: tuple[str, ...] = ()) -> AtopRecipe:
    """A notebook, as it differs from cifar-miss-gau-adv.

    Args:
        name: of the recipe, without the method.
        notebook: its file.
        title: of the recipe.
        changes: its own facts.
        more: what else is not reproduced.
    """

    def code(value: Any, what: str, note: str = "") -> Fact:
        return Fact(value, "code", _at(notebook, what) + note)

    def line(what: str) -> str:
        return _at(notebook, what)

    facts = {
        "data.name": code("cifar10", "data"),
        "data.image_shape": code((3, 256, 256), "size"),
        "data.num_classes": code(10, "data"),
        "classifier.name": code("ResNet-18 for images of 32 x 32, trained on clean images", "classifier"),
        "start.purifier": code("DeepFillv2 trained on Places2 (states_pt_places2.pth)", "start"),
        "defence.transform": code("rt2", "transform"),
        "defence.sigma": code(0.25, "sigma"),
        "defence.block": code(32, "block"),
        "defence.mask_ratio": code(0.25, "ratio"),
        "defence.samples": code(1, "samples"),
        "defence.shared_mask": Fact(
            False,
            "inferred",
            f"one draw for each image is meant; {line('mask')} draws one for the batch",
            official=True,
        ),
        "method.attack_method": code("fgsm", "attack"),
        "method.attack_target": code("classifier", "attack"),
        "attack.eps": code(8 / 255, "attack"),
        "method.reconstruction_target": code("adversarial", "target"),
        "method.reconstruction_weight": Fact(1.0, "code", "train.yaml: l1_loss_alpha"),
        "method.cls_weight": code(0.05, "lambda"),
        "method.cls_delay": code(2, "delay"),
        "method.cls_delay_unit": code("epochs", "delay"),
        "method.classifier_range": Fact(
            "unit", "inferred", f"{line('range')}; models/resnet.py maps by 2x - 1", "doubled"
        ),
        "method.gan_grad": Fact(
            True,
            "second-hand",
            f"the authors' formula; {line('deceived')} cuts it off (detached at {line('detached')})",
            official=False,
        ),
        "method.gan_weight": Fact(1.0, "code", "train.yaml: gan_loss_alpha"),
        "method.gan_fake": code("refined", "fake"),
        "method.discriminator_width": code(64, "discriminator"),
        "method.precision": code("float32", "optimizer", " (no autocast)"),
        "method.schedule": code("constant", "optimizer", " (no scheduler)"),
        "method.learning_rate": Fact(1e-4, "code", "train.yaml: g_lr"),
        "method.betas": Fact((0.5, 0.999), "code", "train.yaml: g_beta1, g_beta2"),
        "loop.epochs": code(300, "epochs"),
        "loop.steps_per_epoch": code(625, "steps"),
        "loop.batch_size": code(8, "batch"),
        "loop.padding": code(0, "augmentation", " (no crop)"),
        "loop.flip": code(True, "flip"),
        "loop.seed": code(777, "seed"),
    }
    return AtopRecipe(f"atop/{name}", title, {**facts, **_evaluations(notebook), **changes}, (*_NOT_REPRODUCED, *more))


def _rt1(notebook: str) -> dict[str, Fact]:
    """What notebooks without noise have otherwise."""
    return {
        "defence.transform": Fact("rt1", "code", _at(notebook, "transform")),
        "defence.sigma": Fact(0.0, "code", _at(notebook, "sigma") + " (no noise)"),
        "method.cls_delay": Fact(0, "code", _at(notebook, "delay")),
        "loop.steps_per_epoch": Fact(101, "code", _at(notebook, "steps")),
    }


def _imagenette(notebook: str) -> dict[str, Fact]:
    """What notebooks on ImageNette have otherwise."""
    return {
        "data.name": Fact("imagenette", "code", _at(notebook, "data")),
        "classifier.name": Fact("ResNet-34, trained on clean images", "code", _at(notebook, "classifier")),
        "loop.padding": Fact(32, "code", _at(notebook, "augmentation") + " (RandomCrop(256, padding=32))"),
        "loop.drop_last": Fact(True, "code", _at(notebook, "loader")),
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
            "method.reconstruction_target": Fact("clean", "code", _at("0..1 cifar-miss-gau-adv.ipynb", "target")),
            "loop.epochs": Fact(
                300, "code", _at("0..1 cifar-miss-gau-adv.ipynb", "epochs") + "; its output ends after 63"
            ),
        },
    ),
    "imagenette": _notebook(
        "imagenette",
        "image-miss-gau-adv.ipynb",
        "AToP on ImageNette with noise and hidden blocks",
        {
            **_imagenette("image-miss-gau-adv.ipynb"),
            "method.cls_weight": Fact(0.1, "code", _at("image-miss-gau-adv.ipynb", "lambda")),
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
