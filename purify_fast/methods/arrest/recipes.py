"""The published trainings of ARREST, number by number, each with its source.

ARREST has no official code. "FAT" is a re-implementation by readers of the paper (sgmath12/FAT): ``methods.py``,
``main.py`` and ``arrest_20ep.yaml``. What they say of the paper is second-hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.classifiers import build_classifier
from ...training.config import TrainingAttack
from ..recipe import Fact, Grade, Recipe
from .config import ArrestConfig
from .task import ArrestTask


@dataclass(frozen=True)
class ArrestRecipe(Recipe):
    """A published ARREST training."""

    def build_classifier(self, width: int | None = None) -> nn.Module:
        """The recipe's network with fresh weights; ARREST begins with one that was trained on clean images.

        Args:
            width: as `purify_fast.models.build_classifier` has it, in place of the recipe's.
        """
        options: dict[str, Any] = self.part("classifier") | ({} if width is None else {"width": width})
        name = options.pop("name")
        shape, classes = self.image_shape, self["data.num_classes"]
        # the sources do not say how images are normalized: the data set's statistics
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return build_classifier(name, shape, classes, mean=mean, std=std, **options)

    def config(self, official_code: bool = False) -> ArrestConfig:
        """The settings of the finetuning.

        Args:
            official_code: as the re-implementation: PGD starts from 0.001 times a normal draw, the drift is looked at
                in training mode, and the representation is pooled.
        """
        attack = TrainingAttack(**self.part("attack", official_code))
        return ArrestConfig(attack=attack, **self.part("method", official_code))

    def task(self, classifier: nn.Module, official_code: bool = False) -> ArrestTask:
        """The finetuning of a classifier in place, for `purify_fast.training.fit`.

        Args:
            classifier: trained on clean images.
            official_code: as for `config`.
        """
        return ArrestTask(classifier, self.config(official_code), self.image_shape)


def _recipe(name: str, title: str, network: dict[str, Fact], note: str) -> ArrestRecipe:
    """A system of the paper.

    Args:
        name: of the recipe, without the method.
        title: of the recipe.
        network: the facts of the classifier.
        note: what of it is not reproduced.
    """
    port: Grade = "second-hand"
    facts = {
        "data.name": Fact("cifar10", "second-hand", "the paper's table 1, as FAT transcribes it"),
        "data.image_shape": Fact((3, 32, 32), "inferred", "CIFAR-10"),
        "data.num_classes": Fact(10, "inferred", "CIFAR-10"),
        **network,
        "start.classifier": Fact("trained on clean images for 100 epochs", port, "FAT: arrest_20ep.yaml, comment"),
        "method.distillation_weight": Fact(50.0, port, "FAT: arrest_20ep.yaml"),
        "method.distance": Fact("abs_cosine", port, "FAT: methods.py, train_arrest"),
        "method.pooled": Fact(False, port, "FAT: methods.py, train_arrest, docstring", official=True),
        "method.replay": Fact(True, "paper", "arXiv 2308.16454, abstract"),
        "method.angle": Fact(30.0, port, "FAT: arrest_20ep.yaml"),
        "method.replay_share": Fact(0.5, port, "FAT: methods.py, train_arrest"),
        "method.drift_mode": Fact("eval", "inferred", "so that statistics are not moved", official="train"),
        "method.optimizer": Fact("sgd", port, "FAT: arrest_20ep.yaml, main.py"),
        "method.learning_rate": Fact(0.025, port, "FAT: main.py"),
        "method.momentum": Fact(0.9, port, "FAT: main.py"),
        "method.weight_decay": Fact(5e-4, port, "FAT: main.py"),
        "method.schedule": Fact("published", port, "FAT: main.py"),
        "method.ema_decay": Fact(0.0, port, "FAT: arrest_20ep.yaml (weight_avg False)"),
        "method.awp_gamma": Fact(0.0, port, "FAT: arrest_20ep.yaml (no AWP)"),
        "attack.eps": Fact(8 / 255, "second-hand", "the paper, as FAT quotes it"),
        "attack.steps": Fact(10, "second-hand", "the paper, as FAT quotes it"),
        "attack.alpha": Fact(2 / 255, "second-hand", "the paper, as FAT quotes it"),
        "attack.start_std": Fact(None, "inferred", "FAT: methods.py; the paper's is not known", official=0.001),
        "loop.epochs": Fact(20, port, "FAT: arrest_20ep.yaml"),
        "loop.batch_size": Fact(128, port, "FAT: arrest_20ep.yaml"),
        "loop.drop_last": Fact(False, port, "FAT: main.py (the loader's default)"),
        "loop.padding": Fact(4, port, "FAT: main.py"),
        "loop.flip": Fact(True, port, "FAT: main.py"),
        "evaluation.attack": Fact("AutoAttack, version standard, 10,000 images", port, "FAT: 5_Appendix.tex"),
    }
    return ArrestRecipe(
        f"arrest/{name}",
        title,
        facts,
        (
            "There is no official code: all of this is from a re-implementation (sgmath12/FAT), and official_code=True "
            "does what that does where the paper is told or believed to say otherwise.",
            note,
            "How the classifier that ARREST begins with was trained is known by its epochs alone.",
            "The order of the images, the crops and the random starts are drawn otherwise.",
        ),
    )


RECIPES: dict[str, ArrestRecipe] = {
    "resnet18": _recipe(
        "resnet18",
        "ARREST of a ResNet-18 on CIFAR-10",
        {
            "classifier.name": Fact("preact_resnet18", "second-hand", "FAT: ResNet-18"),
            "classifier.width": Fact(64, "second-hand", "FAT: ResNet-18"),
        },
        "The network is this package's PreActResNet-18; the sources say ResNet-18.",
    ),
    "wrn_34_10": _recipe(
        "wrn_34_10",
        "ARREST of a WRN-34-10 on CIFAR-10",
        {
            "classifier.name": Fact("wide_resnet", "second-hand", "the paper's table 1, as FAT transcribes it"),
            "classifier.depth": Fact(34, "second-hand", "the paper's table 1, as FAT transcribes it"),
            "classifier.width": Fact(10, "second-hand", "the paper's table 1, as FAT transcribes it"),
            "classifier.activation": Fact("relu", "inferred", "Zagoruyko and Komodakis, BMVC 2016"),
        },
        "Strided convolutions are padded at the bottom and the right alone, as in RobustBench's DMWideResNet.",
    ),
}
