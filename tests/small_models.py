"""Models of a few weights, images for them, and what several files of tests do with both."""

from dataclasses import fields, replace

import torch
from pictures import write_bars
from safetensors.torch import save_file
from torch import nn

from purify_fast.data import load_dataset
from purify_fast.data.datasets import small_digits
from purify_fast.methods.atop import Atop, SmallGenerator
from purify_fast.methods.carso import Carso, official_tensors
from purify_fast.models.classifiers import SmallCNN, WideResNet
from purify_fast.training import TrainingAttack, save_classifier

#: Sizes of a recipe of CARSO with a WideResNet of 10 layers.
SMALL = {
    "classifier.depth": 10,
    "classifier.width": 1,
    "defence.layers": tuple(WideResNet(10, 1).representation_layers()),
    "defence.cond_dim": 8,
    "defence.latent_dim": 2,
}


def smaller(recipe, values=SMALL):
    """A recipe with other values, such as those of a small network."""
    return replace(recipe, values={**recipe.values, **values})


def configured(kind, **options):
    """A config of a method from its own settings and its attack's, which has 8/255 and 10 steps."""
    names = {field.name for field in fields(TrainingAttack)}
    attack = {name: options.pop(name) for name in names & options.keys()}
    return kind(attack=TrainingAttack(**{"eps": 8 / 255, "steps": 10, **attack}), **options)


def images(n=6, shape=(1, 16, 16), seed=1):
    """Random images in [0, 1]."""
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))


def images_and_labels(n, shape, classes, seed=1):
    """Random images in [0, 1], and random labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, *shape), generator=generator), torch.randint(classes, (n,), generator=generator)


def shuffled_digits():
    """The 1,797 digits of 8 x 8 pixels, in [0, 1], and their labels, in random order."""
    x, y = small_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order].float() / 16, y[order]


def first_digits(n):
    """The first images of the data set "digits", in bytes, and their labels."""
    digits = load_dataset("digits")
    return digits.x_train[:n], digits.y_train[:n]


def carso(device="cpu"):
    """CARSO around fresh weights, for grey images of 16 x 16 pixels."""
    torch.manual_seed(0)
    return Carso(SmallCNN(width=4).to(device), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)


def atop(purifier=None, classifier=None, shape=(1, 16, 16), **options):
    """AToP around fresh weights, with blocks of 4 x 4 pixels."""
    torch.manual_seed(0)
    purifier = SmallGenerator(shape[0], width=2) if purifier is None else purifier
    classifier = SmallCNN(shape[0], image_size=shape[1:], width=4) if classifier is None else classifier
    return Atop(classifier, purifier, shape, **{"block": 4, **options})


def bars_and_classifier(folder):
    """Write a data set, of two classes, grey, 16 x 8, and a classifier for it; return the folder of both."""
    write_bars(folder / "bars.npz", 64, 16, 16, 8)
    torch.manual_seed(0)
    save_classifier(SmallCNN(num_classes=2, image_size=(16, 8), width=4), folder / "classifier")
    return folder


class Linear(nn.Module):
    """A classifier of one layer."""

    def __init__(self, features, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(features, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Made(nn.Module):
    """A module of the given parts and attributes, whose forward is a function of itself and of what it is given."""

    def __init__(self, how, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.how = how

    def forward(self, *given):
        return self.how(self, *given)


class NotCopied(Made):
    """A module that cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


class Purifying(nn.Module):
    """A defence that rounds images, or does something else with them, before a classifier."""

    def __init__(self, classifier, how=lambda x: (8 * x).round() / 8):
        super().__init__()
        self.classifier, self.how = classifier, how

    def purify(self, x):
        return self.how(x)

    def forward(self, x):
        return self.classifier(self.purify(x))


class Halved(nn.Module):
    """A purifier of no parameters but one."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, transformed, mask):
        return self.share * transformed


def write_official(defence, folder, stem):
    """Write the three official files of a CARSO system."""
    folder.mkdir(exist_ok=True)
    for part, tensors in official_tensors(defence).items():
        own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(own, folder / f"{stem}_{part}.safetensors")


def with_statistics(model, mean=0.0):
    """BatchNorm's statistics as a trained model would have them; the running means are at most ``mean``."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -mean, mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def with_random_norms(model):
    """In evaluation mode, with BatchNorms whose weights, biases and statistics are all random."""
    for module in with_statistics(model, 0.5).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def lively(model, gain):
    """Convolutions under which the result depends on the image: the signal fades under the weights they start with."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=gain / layer.weight[0].numel() ** 0.5)
    return model


def answers(model, *given):
    """The result, and the gradient to the first of what is given of a sum of the result with random weights."""
    leaf = given[0].clone().requires_grad_()
    out = model(leaf, *given[1:])
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaf)]


def accuracy(model, x, y):
    """Percent of the images that are classified right."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def labelled(images, classes=10, low=0.0):
    """A linear model, so many random images ``[n, 3, 4, 4]`` in [low, 1 - low], and the classes that it gives them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
        x = low + (1 - 2 * low) * torch.rand(images, 3, 4, 4)
    with torch.no_grad():
        return model, x, model(x).argmax(1)
