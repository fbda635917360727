"""The weight files of CARSO's authors: read, and judged under exact gradients.

The official code publishes three safetensors files for a system, and RobustBench the classifier's weights. Nothing is
downloaded here: bring the files, or rehearse with files that this script writes itself.

    python examples/read_published_weights.py --folder DIR --classifier FILE.pt --data cifar10 --root DIR
    python examples/read_published_weights.py --tiny
"""

from __future__ import annotations

import tempfile

import torch
import tyro

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.data import to_float
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.methods.carso import Carso, published_decoder
from purify_fast.methods.recipes import recipe as recipe_named
from purify_fast.models import WideResNet


def rehearsal(folder: str) -> torch.nn.Module:
    """Write the three files of a small system with fresh weights, and return its classifier.

    Args:
        folder: where to.
    """
    classifier = WideResNet(depth=10, width=1).eval()
    layers, shape = classifier.representation_layers(), (3, 32, 32)
    small = Carso(classifier, layers, shape, cond_dim=16, latent_dim=4, decoder=published_decoder(shape))
    small.save_official(folder, "rehearsal")
    return classifier


def main(
    folder: str | None = None,
    classifier: str | None = None,
    data: str = "cifar10",
    root: str = "data",
    recipe: str = "carso/cifar10",
    images: int = 100,
    tiny: bool = False,
) -> None:
    """Read a published system, and attack it through PeeL, its authors' output, and through exact gradients.

    Args:
        folder: with the three files; needed without --tiny.
        classifier: state dict of the classifier; needed without --tiny.
        data: a data set's name, or the path of an .npz file.
        root: the folder that holds it.
        recipe: of the published system whose classifier is built.
        images: held-out images to attack.
        tiny: files with fresh weights and random images: that it runs.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        if tiny:
            folder, network = temporary, rehearsal(temporary)
            x = torch.rand(4, 3, 32, 32)
            y = network(x).argmax(1)
        elif folder is None or classifier is None:
            raise SystemExit("name the files with --folder and --classifier, or rehearse with --tiny")
        else:
            network = recipe_named(recipe).build_classifier()
            # weights_only: a file of tensors is read, nothing in it is run
            network.load_state_dict(torch.load(classifier, weights_only=True))
            held_out = purify_fast.load_dataset(data, root)
            x, y = to_float(held_out.x_test[:images]), held_out.y_test[:images]
        defence = Carso.from_official(network.eval(), folder)
    steps = 2 if tiny else 50
    attacks = [
        # as its authors attack it: through an output whose gradients are not finite
        AttackSpec(PGD(steps=steps), aggregation="peel_reference", label="through PeeL"),
        # the same decisions through a logsumexp, which has gradients
        PGD(steps=steps),
    ]
    print(evaluate(defence, x, y, eps=8 / 255, base=network, attacks=attacks, progress=not tiny).to_text())


if __name__ == "__main__":
    tyro.cli(main)
