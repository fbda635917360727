"""Train AToP on a folder of images: the purifier first learns to repair images, then to support the classifier.

The folder contains train/<class>/*.jpg or *.png, and val/<class>/ in the same form.

    python examples/atop_on_image_folder.py --data DIR --size 128
    python examples/atop_on_image_folder.py --tiny        # uses random images, and takes seconds
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchvision
import tyro

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.data import to_float
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit

EPS = 8 / 255


def random_folder(folder: Path, size: int) -> Path:
    """Make a folder with two classes of random images.

    Args:
        folder: path of the folder.
        size: height and width of the images.
    """
    for split, count in (("train", 16), ("val", 4)):
        for name, shade in (("dark", 0), ("light", 128)):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = shade + torch.randint(0, 128, (3, size, size), dtype=torch.uint8)
                torchvision.io.write_png(image, str(place / f"{i}.png"))
    return folder


def main(data: Path | None = None, size: int = 32, epochs: int = 10, tiny: bool = False) -> None:
    """Train a classifier and its purifier, and evaluate the defence.

    Args:
        data: the folder of images; required without --tiny.
        size: height and width to which images are resized.
        epochs: number of epochs of each training.
        tiny: use random images and a single epoch, to see that the script runs.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        if tiny:
            data, epochs = random_folder(Path(temporary) / "images", size), 1
        if data is None:
            raise SystemExit("give a folder with --data, or try the script with --tiny")
        images = purify_fast.load_dataset(data, image_size=(size, size))
        x, y = images.x_train, images.y_train
        loop = FitConfig(epochs=epochs, batch_size=16, flip=True)

        classifier = purify_fast.models.build_classifier("small_cnn", images.image_shape, images.num_classes)
        standard = ClassifierConfig(attack=TrainingAttack(eps=0, steps=1))
        fit(ClassifierTask(classifier, standard), x, y, loop, title="classifier")

        defence = Atop(classifier.eval(), SmallGenerator(3), images.image_shape, transform="rt2")
        fit(AtopTask(defence, AtopConfig.pretraining()), x, y, loop, title="repairing")
        # Here, unlike in the paper, PGD attacks the transform, the purifier and the classifier together.
        pipeline = AtopConfig(attack_method="pgd", attack_target="pipeline", cls_weight=1.0, cls_delay=0)
        fit(AtopTask(defence, pipeline), x, y, loop, title="through the pipeline")

        x_test, y_test = to_float(images.x_test[:100]), images.y_test[:100]
    steps = 2 if tiny else 40
    attacks = [PGD(steps=steps), AttackSpec(PGD(steps=steps), through=defence.classifier)]
    report = evaluate(defence.eval(), x_test, y_test, eps=EPS, eot_iter=2, attacks=attacks, name="AToP")
    print(report.to_text())


if __name__ == "__main__":
    tyro.cli(main)
