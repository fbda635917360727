"""The published trainings of CARSO, number by number, each with its source.

A source without a name before it is a file of the official repository (emaballarin/CARSO, commit 307b873) with its
line. "ebtorch" is that repository's library (emaballarin/ebtorch, commit e9f8d99). The first version of the method,
mnist_v1, is in earlier commits of the repository (8dadfc8, 5f65f97).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...models.classifiers import FullyConnected
from ...models.foreign import load_state, read_weights
from ...models.wide_resnet import WideResNet, representation_layers
from ...training.config import TrainingAttack
from ..recipe import Fact, Recipe
from .config import CarsoConfig, atom_size
from .defence import Carso
from .networks import published_decoder
from .official import PARTS
from .task import CarsoTask


@dataclass(frozen=True)
class CarsoRecipe(Recipe):
    """A published CARSO system."""

    def build_classifier(self) -> nn.Module:
        """The system's classifier, with fresh weights; the published ones are not part of this package."""
        channels, *size = self.image_shape
        options: dict[str, Any] = {"mean": self["data.mean"], "std": self["data.std"], "in_channels": channels}
        options["num_classes"] = self["data.num_classes"]
        if self["classifier.name"] == "wide_resnet":
            return WideResNet(self["classifier.depth"], self["classifier.width"], **options)
        return FullyConnected(image_size=size, **options)

    def arguments(self) -> dict[str, Any]:
        """What `Carso` takes beside the classifier."""
        decoder = published_decoder(self.image_shape) if self["defence.version"] == "v4" else None
        data = {"image_shape": self.image_shape, "mean": self["data.mean"], "std": self["data.std"]}
        return {**self.part("defence"), **data, "decoder": decoder}

    def config(self, official_code: bool = False) -> CarsoConfig:
        """The settings of the training.

        The authors' code scales eps (`CarsoConfig.eps_mode`), and every process rounds the number of attacked images
        down by itself, so that TinyImageNet is trained without any adversarial example.

        Args:
            official_code: reproduce both.
        """
        settings = self.part("method", official_code)
        if official_code:
            local = self["loop.batch_size"] // self["run.processes"]
            fraction = 4 * atom_size(local, settings["adversarial_fraction"], allow_none=True) / local
            settings |= {"adversarial_fraction": fraction, "allow_no_adversarial": fraction == 0}
        return CarsoConfig(attack=TrainingAttack(**self.part("attack")), **settings)

    def defence(self, classifier: nn.Module, **changes: Any) -> Carso:
        """The defence with a fresh purifier.

        Args:
            classifier: as `build_classifier` makes it, with weights of yours.
            changes: arguments of `Carso` that take the place of the recipe's.

        Raises:
            ValueError: a classifier with other layers or another number of classes.
        """
        made = Carso(classifier, **{**self.arguments(), **changes})
        if made.num_classes != self["data.num_classes"]:
            raise ValueError(
                f"classifier: it has {made.num_classes} classes, {self.name} ({self['data.name']}) has "
                f"{self['data.num_classes']}"
            )
        return made

    def load(self, directory: str | Path, classifier_weights: str | Path | None = None) -> Carso:
        """The system with its authors' weights, in evaluation mode.

        Args:
            directory: where the three safetensors files of the purifier are, and the classifier's file unless it is
                named.
            classifier_weights: the file of the classifier's weights; None: the one file of weights in ``directory``
                that is not the purifier's, or of several the one that is called as the authors call it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: nothing was published, or files of another system; the message says what differs.
        """
        if self["defence.version"] != "v4":
            published = ", ".join(name for name, recipe in RECIPES.items() if recipe["defence.version"] == "v4")
            raise ValueError(f"recipe must be a system whose weights were published, {published}, got {self.name!r}")
        folder = Path(directory)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: it must hold the published files of CARSO")
        classifier = self.build_classifier()
        path = Path(classifier_weights or self._classifier_file(folder))
        load_state(
            classifier, read_weights(path), f"{path} does not hold the classifier of this system", drop_prefix=True
        )
        defence = Carso.from_official(classifier, folder, samples=self["defence.samples"])
        if defence.image_shape != self.image_shape:
            shapes = f"images {list(defence.image_shape)}, {self.name} has {list(self.image_shape)}"
            raise ValueError(f"{folder} holds a system for {shapes}")
        return defence

    def _classifier_file(self, folder: Path) -> Path:
        """The file of weights that is none of the purifier's."""
        endings, purifier = (".pt", ".pth", ".safetensors"), tuple(f"_{part}.safetensors" for part in PARTS)
        files = sorted(p for p in folder.iterdir() if p.suffix in endings and not p.name.endswith(purifier))
        weights = self["start.classifier"].partition(":")[0]
        chosen = [path for path in files if path.stem == weights] or files
        if len(chosen) == 1:
            return chosen[0]
        if not chosen:
            raise FileNotFoundError(
                f"{folder} lacks the classifier that this system purifies for: put its weights there, which its "
                f"authors call {weights} ({', '.join(endings)}), or name the file (--classifier-weights)"
            )
        names = ", ".join(path.name for path in chosen)
        raise ValueError(
            f"{folder} holds several files that may be the classifier's, {names}: name it (--classifier-weights)"
        )

    def task(self, defence: Carso, official_code: bool = False) -> CarsoTask:
        """The training of a defence, for `purify_fast.training.fit`.

        Args:
            defence: what is trained.
            official_code: as for `config`.
        """
        return CarsoTask(defence, self.config(official_code))


def _run(at: str, head: int) -> dict[str, Fact]:
    """What a script's training does beside the numbers of its configuration.

    Args:
        at: the script.
        head: by how many lines its head is longer than that of train_a.
    """
    rate = "from 5e-9 up to the rate in an eighth of the epochs, flat for an eighth, down to 1.25e-8 times the batch"
    attacks = f"{at}:251,263; src/tooling/attacks.py:79-107 (PGD)"
    beta = "0 for an eighth of the epochs, then up to 1 in a twenty-fourth"
    return {
        "run.attacks": Fact("PGD and FGSM, each at eps 4/255 and 8/255", "code", attacks),
        "run.schedule": Fact(rate, "code", f"{at}:{52 + head}-{57 + head}"),
        "run.beta": Fact(beta, "code", f"{at}:{59 + head}-{61 + head}"),
    }


def _v4(
    name: str, title: str, script: str, *, start: Fact, mean: Fact, std: Fact, **numbers: tuple[Any, str]
) -> CarsoRecipe:
    """A system of the paper's versions 4 to 6.

    Args:
        name: of the system.
        title: of the recipe.
        script: its official training script, without the ending.
        start: the classifier's weights.
        mean: of the data's channels.
        std: of the data's channels.
        numbers: values and where they stand, by key with two underscores for the point.
    """
    shell = f"carsotrain_{script[-1]}.sh"
    at = f"src/{script}.py"
    # the third script has a line less at its head, and one more before the classifier
    c = script == "train_c"
    head, network = (-1, 174) if c else (0, 173)
    facts = {
        "classifier.name": Fact("wide_resnet", "code", f"{at}:{network}"),
        "classifier.depth": Fact(28, "code", f"{at}:{network} (ebtorch's default)"),
        "classifier.width": Fact(10, "code", f"{at}:{network} (ebtorch's default)"),
        "data.mean": mean,
        "data.std": std,
        "start.classifier": start,
        "defence.layers": Fact(tuple(representation_layers(28)), "code", f"{at}:{178 if c else 177}"),
        "defence.version": Fact("v4", "inferred", "versions 4 to 6 of arXiv 2306.06081"),
        "defence.samples": Fact(8, "code", "src/eval_a.py:86"),
        "defence.encoder_depth": Fact(4 if c else 3, "code", "src/tooling/modelpieces.py"),
        "method.attack_target": Fact("classifier", "code", f"{at}:251"),
        "method.eps_mode": Fact("paper", "second-hand", "reviews of the paper give 8/255", official="official_code"),
        "method.kl_delay": Fact(0.125, "code", f"{at}:{59 + head}"),
        "method.beta": Fact(1.0, "code", f"{at}:{61 + head}"),
        "method.reduction": Fact("sum", "code", f"{at}:300 (ebtorch's beta_reco_bce_splitout)"),
        "method.optimizer": Fact("radam_lookahead", "code", f"{at}:232"),
        "method.lookahead_steps": Fact(6, "code", f"{at}:{50 + head}"),
        "method.lookahead_alpha": Fact(0.8, "code", "ebtorch: optim/custom.py"),
        "method.schedule": Fact("published", "code", f"{at}:238"),
        "attack.eps": Fact(8 / 255, "second-hand", "reviews of the paper; src/tooling/attacks.py:29 scales it"),
        "attack.steps": Fact(40, "code", "src/tooling/attacks.py:100"),
        "attack.alpha": Fact(0.01, "code", "src/tooling/attacks.py:101"),
        "attack.random_start": Fact(True, "code", "src/tooling/attacks.py:102"),
        "loop.drop_last": Fact(False, "code", f"{at}:158 (the loader's default)"),
        "loop.padding": Fact(0, "code", f"{at}:140 (no crop)"),
        "loop.flip": Fact(False, "code", f"{at}:140 (no flip)"),
        **_run(at, head),
        "run.processes": Fact(4 if script == "train_b" else 8, "code", f"{shell}:7"),
        "evaluation.attack": Fact("AutoAttack, version rand", "code", "src/eval_a.py:225"),
        "evaluation.output": Fact("PeeL", "code", "src/eval_a.py:93"),
        **{key.replace("__", "."): Fact(value, "code", where) for key, (value, where) in numbers.items()},
    }
    local = facts["loop.batch_size"].value // facts["run.processes"].value
    facts["method.learning_rate"] = Fact(1e-4 * local, "code", f"{at}:234 (1e-4 times the batch of one process)")
    return CarsoRecipe(
        f"carso/{name}",
        title,
        facts,
        (
            "The classifier's weights are not part of this package.",
            "The authors' code lets cuDNN's convolutions round to TF32, as PyTorch does by default. Here float32 is "
            "that of IEEE, and precision='tf32' rounds convolutions and matrix products.",
            "The order of the images and the random starts are drawn otherwise.",
        ),
    )


RECIPES: dict[str, CarsoRecipe] = {
    "cifar10": _v4(
        "cifar10",
        "CARSO on CIFAR-10",
        "train_a",
        start=Fact("cifar10_a3_b10_t4_20m_w: Cui et al. 2023, WRN-28-10", "code", "src/train_a.py:174"),
        mean=Fact((0.4914, 0.4822, 0.4465), "code", "ebtorch: architectures_resnets_dm.py, as RobustBench has it"),
        std=Fact((0.2471, 0.2435, 0.2616), "code", "ebtorch: architectures_resnets_dm.py, as RobustBench has it"),
        data__name=("cifar10", "src/train_a.py:39"),
        data__image_shape=((3, 32, 32), "src/train_a.py:210"),
        data__num_classes=(10, "src/train_a.py:173"),
        defence__cond_dim=(512, "src/train_a.py:45"),
        defence__latent_dim=(128, "src/train_a.py:46"),
        method__adversarial_fraction=(0.5, "src/train_a.py:107"),
        loop__epochs=(200, "src/train_a.py:93"),
        loop__batch_size=(5120, "src/train_a.py:100"),
    ),
    "cifar100": _v4(
        "cifar100",
        "CARSO on CIFAR-100",
        "train_b",
        start=Fact("cifar100_a5_b12_t4_50m_w: Cui et al. 2023, WRN-28-10", "code", "src/train_b.py:174"),
        mean=Fact((0.5071, 0.4865, 0.4409), "code", "ebtorch: architectures_resnets_dm.py, as RobustBench has it"),
        std=Fact((0.2673, 0.2564, 0.2762), "code", "ebtorch: architectures_resnets_dm.py, as RobustBench has it"),
        data__name=("cifar100", "src/train_b.py:39"),
        data__image_shape=((3, 32, 32), "src/train_b.py:210"),
        data__num_classes=(100, "src/train_b.py:173"),
        defence__cond_dim=(512, "src/train_b.py:45"),
        defence__latent_dim=(128, "src/train_b.py:46"),
        method__adversarial_fraction=(0.15, "src/train_b.py:107"),
        loop__epochs=(200, "src/train_b.py:93"),
        loop__batch_size=(2560, "carsotrain_b.sh:39"),
    ),
    "tiny_imagenet": _v4(
        "tiny_imagenet",
        "CARSO on TinyImageNet-200",
        "train_c",
        start=Fact("tiny_linf_wrn28_10_w: Wang et al. 2023, WRN-28-10", "code", "src/train_c.py:175"),
        mean=Fact((0.4802, 0.4481, 0.3975), "code", "ebtorch: architectures_resnets_dm.py"),
        std=Fact((0.2302, 0.2265, 0.2262), "code", "ebtorch: architectures_resnets_dm.py"),
        data__name=("tiny_imagenet", "src/train_c.py:39"),
        data__image_shape=((3, 64, 64), "src/train_c.py:210"),
        data__num_classes=(200, "src/train_c.py:174"),
        defence__cond_dim=(768, "src/train_c.py:43"),
        defence__latent_dim=(192, "src/train_c.py:44"),
        method__adversarial_fraction=(0.01, "src/train_c.py:106 (its help says 0.04)"),
        loop__epochs=(250, "src/train_c.py:92"),
        loop__batch_size=(1024, "src/train_c.py:99"),
    ),
    "mnist_v1": CarsoRecipe(
        "carso/mnist_v1",
        "the first version of CARSO, on MNIST",
        {
            "classifier.name": Fact("fully_connected", "code", "architectures.py (8dadfc8)"),
            "start.classifier": Fact("fcn_mnist_adv: trained adversarially", "code", "train_a_carso.py (8dadfc8)"),
            "data.name": Fact("mnist", "code", "train_a_carso.py (8dadfc8)"),
            "data.image_shape": Fact((1, 28, 28), "code", "train_a_carso.py (8dadfc8)"),
            "data.num_classes": Fact(10, "code", "train_a_carso.py (8dadfc8)"),
            "data.mean": Fact((0.1307,), "code", "architectures.py (8dadfc8)"),
            "data.std": Fact((0.3081,), "code", "architectures.py (8dadfc8)"),
            "defence.layers": Fact(("body.1", "body.5", "body.9"), "code", "train_a_carso.py (8dadfc8)"),
            "defence.version": Fact("v1", "inferred", "the first version of arXiv 2306.06081"),
            "defence.cond_dim": Fact(130, "code", "train_a_carso.py (8dadfc8)"),
            "defence.latent_dim": Fact(64, "code", "train_a_carso.py (8dadfc8)"),
            "defence.samples": Fact(4, "code", "eval_a_individual.py (5f65f97)"),
            "method.attack_target": Fact("classifier", "code", "train_a_carso.py (8dadfc8)"),
            "method.adversarial_fraction": Fact(0.4, "code", "train_a_carso.py (8dadfc8)"),
            "method.kl_delay": Fact(0.0, "code", "train_a_carso.py (8dadfc8)"),
            "method.beta": Fact(1.0, "code", "train_a_carso.py (8dadfc8)"),
            "method.reduction": Fact("sum", "code", "train_a_carso.py (8dadfc8)"),
            "method.optimizer": Fact("radam_lookahead", "code", "train_a_carso.py (8dadfc8)"),
            "method.lookahead_steps": Fact(5, "code", "train_a_carso.py (8dadfc8)"),
            "method.lookahead_alpha": Fact(0.8, "code", "ebtorch: optim/custom.py"),
            "method.schedule": Fact("published_v1", "code", "train_a_carso.py (8dadfc8)"),
            "method.learning_rate": Fact(0.04608, "inferred", "3e-5 times the batch size"),
            "attack.eps": Fact(0.3, "code", "attacks.py (8dadfc8)"),
            "attack.steps": Fact(40, "code", "attacks.py (8dadfc8)"),
            "attack.alpha": Fact(0.01, "code", "attacks.py (8dadfc8)"),
            "loop.epochs": Fact(150, "code", "train_a_carso.py (8dadfc8)"),
            "loop.batch_size": Fact(1536, "code", "train_a_carso.py (8dadfc8)"),
            "loop.drop_last": Fact(False, "inferred", "the loader's default"),
            "run.processes": Fact(1, "code", "train_a_carso.py (8dadfc8)"),
            "evaluation.attack": Fact("AutoAttack", "code", "eval_a_individual.py (5f65f97)"),
        },
        ("The classifier's weights are not part of this package.",),
    ),
}
