"""Put CARSO's purifier in front of a torchvision model: predict, attack, save and load.

python examples/wrap_a_torchvision_model.py
python examples/wrap_a_torchvision_model.py --weights IMAGENET1K_V1 --size 224   # needs the weights on this machine
"""

from __future__ import annotations

import tempfile

import torch
import torchvision
import tyro

import purify_fast
from purify_fast.attacks import pgd


def main(name: str = "resnet18", weights: str | None = None, size: int = 32, images: int = 2, steps: int = 3) -> None:
    """Wrap a model and attack it through the purifier.

    Args:
        name: name of the torchvision model.
        weights: torchvision's name of the weights; None: random weights, which need no download.
        size: height and width of the images.
        images: number of random images.
        steps: number of steps of PGD.
    """
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=weights)
    # Images are in [0, 1], so the classifier must contain the normalization.
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    classifier = torch.nn.Sequential(normalize, model).eval()
    # The names of layers are those in classifier.named_modules().
    layers = ["1.layer2", "1.layer4"]
    defence = purify_fast.Carso(classifier, layers, (3, size, size), cond_dim=64, latent_dim=16, samples=4).eval()

    x = torch.rand(images, 3, size, size)
    y = classifier(x).argmax(1)
    x_adv = pgd(defence, x, y, eps=4 / 255, alpha=2 / 255, steps=steps)
    print(f"logits {tuple(defence(x_adv).shape)}, moved by at most {(x_adv - x).abs().max():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        # This saves only the purifier. Save the classifier yourself.
        defence.save(folder)
        again = purify_fast.load_defence(folder, classifier)
    with defence.fixed_noise(0), again.fixed_noise(0):
        assert torch.equal(defence(x), again(x))
    print("saved and loaded: the same predictions. train_carso_cifar10.py shows how to train the purifier.")


if __name__ == "__main__":
    tyro.cli(main)
