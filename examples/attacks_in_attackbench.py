"""Run attacks of this package in AttackBench (Cina et al., AAAI 2025), which counts the queries of each image.

AttackBench stops an attack after a budget of queries. This script needs the package attackbenchlib.

    python examples/attacks_in_attackbench.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attackbench
import torch
import tyro
from torch.utils.data import DataLoader, TensorDataset

from purify_fast import zoo
from purify_fast.attacks import APGD, FABT, Attack
from purify_fast.data import load_dataset, to_float


def for_attackbench(*attacks: Attack) -> Callable[..., torch.Tensor]:
    """Make an attack for ``attackbench.run_attack`` from several attacks, which run one after the other.

    Each attack gets only the images that the earlier attacks did not break.

    Args:
        *attacks: attacks without a radius of their own.
    """

    def attack(
        model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, threat_model: Any, epsilon: float
    ) -> torch.Tensor:
        images = inputs.clone()
        for one in attacks:
            with torch.no_grad():
                left = (model(images).argmax(1) == labels).nonzero()[:, 0]
            images[left] = one(model, inputs[left], labels[left], epsilon, norm=threat_model)
        return images

    return attack


def main(images: int = 50, eps: float = 0.1, queries: int = 2000) -> None:
    """Attack an adversarially trained classifier of digits.

    Args:
        images: number of held-out images to attack.
        eps: radius in the norm L-inf, in image units.
        queries: largest number of forward and backward passes per image.
    """
    digits = load_dataset("digits")
    loader = DataLoader(TensorDataset(to_float(digits.x_test[:images]), digits.y_test[:images]), batch_size=images)
    # In float32 the model itself computes all gradients. AttackBench could not count the queries of a faster copy.
    attack = for_attackbench(APGD(precision="float32"), FABT(precision="float32"))
    results = attackbench.run_attack(
        zoo.load("digits-pgd-at"),
        loader,
        attack,
        "linf",
        device=torch.device("cpu"),
        query_budget=queries,
        epsilon=eps,
        debug=True,
        attack_name="apgd-fab",
        attack_lib="purify_fast",
    )
    used = torch.tensor(results["num_forwards"]) + torch.tensor(results["num_backwards"])
    print(f"{sum(results['adv_success'])} of {images} images fell, with at most {int(used.max())} queries per image")


if __name__ == "__main__":
    tyro.cli(main)
