"""Finetune a standard classifier by ARREST, and train CARSO's purifier in front of the result.

python examples/arrest_then_carso.py            # trains on the package's digits, for some minutes
python examples/arrest_then_carso.py --tiny     # takes seconds, and its numbers mean nothing
"""

from __future__ import annotations

import torch
import tyro

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.data import to_float
from purify_fast.evaluation import evaluate
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit

EPS = 0.2


def main(tiny: bool = False) -> None:
    """Train a standard classifier, ARREST and CARSO, and evaluate the last two.

    Args:
        tiny: use few images and few epochs, to see that the script runs.
    """
    torch.manual_seed(0)
    digits = purify_fast.load_dataset("digits")
    count = 64 if tiny else len(digits.x_train)
    x, y = digits.x_train[:count], digits.y_train[:count]

    def loop(epochs: int) -> FitConfig:
        return FitConfig(epochs=3 if tiny else epochs, batch_size=32 if tiny else 64)

    classifier = purify_fast.models.build_classifier("small_cnn", digits.image_shape, digits.num_classes)
    standard = ClassifierConfig(attack=TrainingAttack(eps=0, steps=1))
    fit(ClassifierTask(classifier, standard), x, y, loop(20), title="standard")

    config = ArrestConfig(attack=TrainingAttack(eps=EPS, steps=2 if tiny else 10, eps_warmup=0.5))
    arrest = ArrestTask(classifier, config, digits.image_shape, layers=["hidden"])
    fit(arrest, x, y, loop(40), title="ARREST")
    finetuned = arrest.result.eval()

    defence = Carso(finetuned, ["conv4", "hidden"], digits.image_shape, cond_dim=32, latent_dim=8, samples=4)
    for target, epochs in (("classifier", 30), ("pipeline", 20)):
        carso = CarsoConfig(attack_target=target, attack=TrainingAttack(eps=EPS, steps=2 if tiny else 7))
        fit(CarsoTask(defence, carso), x, y, loop(epochs), title=f"CARSO, attacks on the {target}")

    images = slice(0, 16 if tiny else 200)
    x_test, y_test = to_float(digits.x_test[images]), digits.y_test[images]
    for name, model in (("ARREST", finetuned), ("CARSO on ARREST", defence.eval())):
        steps = 2 if tiny else 40
        attacks = [PGD(steps=steps), PGD(steps=steps, loss="dlr")]
        print(evaluate(model, x_test, y_test, eps=EPS, attacks=attacks, name=name, progress=False).to_text())


if __name__ == "__main__":
    tyro.cli(main)
