"""Train CARSO on CIFAR-10: a classifier, then its purifier with the paper's objective, and then through the pipeline.

python examples/train_carso_cifar10.py --data cifar10 --root DIR    # takes hours on a CPU
python examples/train_carso_cifar10.py --tiny                        # uses random images, and takes seconds
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.data import DataSet, to_float
from purify_fast.evaluation import evaluate
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit

EPS = 8 / 255


def random_images() -> DataSet:
    """Make random images, to see that the script runs."""
    x = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    y = torch.arange(64) % 10
    return DataSet(x, y, x[:8], y[:8], "random images", 10)


def main(data: str = "cifar10", root: str = "data", out: Path = Path("runs/carso_cifar10"), tiny: bool = False) -> None:
    """Train and evaluate CARSO. If the script is interrupted and started again, it continues.

    Args:
        data: name of a data set, or path of an .npz file.
        root: folder of the data set.
        out: folder for checkpoints and the result.
        tiny: use random images and few epochs, to see that the script runs.
    """
    torch.manual_seed(0)
    images = random_images() if tiny else purify_fast.load_dataset(data, root)
    x, y = images.x_train, images.y_train
    steps, batch = (1, 16) if tiny else (10, 128)

    classifier = purify_fast.models.build_classifier(
        "small_cnn" if tiny else "preact_resnet18", images.image_shape, images.num_classes
    )
    adversarial = ClassifierConfig(attack=TrainingAttack(eps=EPS, steps=steps))
    epochs = FitConfig(epochs=1 if tiny else 50, batch_size=batch, padding=4, flip=True)
    fit(ClassifierTask(classifier, adversarial), x, y, epochs, out / "classifier", "classifier")

    layers = ["conv3", "conv4"] if tiny else ["layer2", "layer4"]
    sizes = {"cond_dim": 32, "latent_dim": 8, "samples": 2} if tiny else {"cond_dim": 512, "latent_dim": 128}
    defence = Carso(classifier.eval(), layers, images.image_shape, **sizes)
    objective = CarsoConfig(attack=TrainingAttack(eps=EPS, steps=steps))
    epochs = FitConfig(epochs=3 if tiny else 100, batch_size=batch)
    fit(CarsoTask(defence, objective), x, y, epochs, out / "objective", "the paper's objective")
    # Here, unlike in the paper, the attacks see the whole defence. This training matters most for robustness.
    pipeline = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=EPS, steps=steps))
    epochs = FitConfig(epochs=1 if tiny else 20, batch_size=batch)
    fit(CarsoTask(defence, pipeline), x, y, epochs, out / "pipeline", "through the pipeline")
    defence.save(out / "defence")

    held_out = slice(0, 8 if tiny else 500)
    x_test, y_test = to_float(images.x_test[held_out]), images.y_test[held_out]
    attacks = [PGD(steps=2)] if tiny else None
    for name, model in (("base", classifier), ("CARSO", defence.eval())):
        report = evaluate(model, x_test, y_test, eps=EPS, attacks=attacks, name=name, out=out / "rows" / name)
        print(report.to_text())


if __name__ == "__main__":
    tyro.cli(main)
