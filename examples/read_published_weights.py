"""Read the weight files of CARSO's authors, and evaluate the system with exact gradients.

The authors publish three safetensors files for a system, and RobustBench publishes the weights of its classifier. This
script downloads nothing. Give the files, or try the script with files that it writes itself.

    python examples/read_published_weights.py --folder DIR --classifier FILE.pt --data cifar10 --root DIR
    python examples/read_published_weights.py --tiny
"""

from __future__ import annotations

import tempfile

import torch
import tyro
from safetensors.torch import save_file

import purify_fast
from purify_fast.attacks import PGD
from purify_fast.data import to_float
from purify_fast.defences import WithAggregation
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.methods.carso import Carso, load_official, official_tensors, published_decoder
from purify_fast.methods.recipes import recipe as recipe_named
from purify_fast.models import WideResNet


def rehearsal(folder: str) -> torch.nn.Module:
    """Write the three files of a small system with random weights, and return its classifier.

    Args:
        folder: folder for the files.
    """
    classifier = WideResNet(depth=10, width=1).eval()
    layers, shape = classifier.representation_layers(), (3, 32, 32)
    small = Carso(classifier, layers, shape, cond_dim=16, latent_dim=4, decoder=published_decoder(shape))
    for part, tensors in official_tensors(small).items():
        own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(own, f"{folder}/rehearsal_{part}.safetensors")
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
    """Read a published system. Attack it through PeeL (the aggregation of its authors), and then with exact gradients.

    Args:
        folder: folder of the three files; required without --tiny.
        classifier: file with the state dict of the classifier; required without --tiny.
        data: name of a data set, or path of an .npz file.
        root: folder of the data set.
        recipe: recipe of the published system, from which the classifier is built.
        images: number of held-out images to attack.
        tiny: use random weights and random images, to see that the script runs.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        if tiny:
            folder, network = temporary, rehearsal(temporary)
            x = torch.rand(4, 3, 32, 32)
            y = network(x).argmax(1)
        elif folder is None or classifier is None:
            raise SystemExit("give the files with --folder and --classifier, or try the script with --tiny")
        else:
            network = recipe_named(recipe).build_classifier()
            # With weights_only, only tensors are read from the file, and no code in it is run.
            network.load_state_dict(torch.load(classifier, weights_only=True))
            held_out = purify_fast.load_dataset(data, root)
            x, y = to_float(held_out.x_test[:images]), held_out.y_test[:images]
        defence = load_official(network.eval(), folder)
    steps = 2 if tiny else 50
    attacks = [
        # The authors attack the output of PeeL, whose gradients are not finite.
        AttackSpec(PGD(steps=steps), through=WithAggregation(defence, "peel_reference"), label="through PeeL"),
        # This attack uses the logsumexp, which has the same decisions and exact gradients.
        PGD(steps=steps),
    ]
    print(evaluate(defence, x, y, eps=8 / 255, base=network, attacks=attacks, progress=not tiny).to_text())


if __name__ == "__main__":
    tyro.cli(main)
