"""A training of a second, which several files of tests disturb: its images, its task, and one run of it."""

import torch

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit


def images(n=64):
    """Images of two classes, 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(n) % 2


def task(width=2):
    """The training of a classifier, from the same weights each time."""
    torch.manual_seed(0)
    return ClassifierTask(SmallCNN(1, 2, (8, 8), width), ClassifierConfig())


def train(folder, epochs=3, **options):
    """The weights after so many epochs of four steps."""
    made = task()
    fit(made, *images(), FitConfig(epochs, 16, **options), folder, progress=False)
    return made.model.state_dict()
