"""A system with its authors' weights, here with files of small shapes."""

import pytest
import torch
from safetensors.torch import save_file
from small_models import smaller, write_official

from purify_fast.methods.carso import RECIPES
from purify_fast.methods.recipes import recipe

STEM, WEIGHTS = "wrn_28_10_cifar_10_cui_2023", "cifar10_a3_b10_t4_20m_w"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The four files of a system; a network of 10 layers stands for the one of 28."""
    made = smaller(RECIPES["cifar10"])
    monkeypatch.setitem(RECIPES, "cifar10", made)
    torch.manual_seed(0)
    classifier = made.build_classifier()
    folder = tmp_path / "models"
    write_official(made.defence(classifier), folder, STEM)
    # as the authors' code saves it: around the network stand DataParallel and a Sequential
    wrapped = {f"module.0.{name}": tensor for name, tensor in classifier.state_dict().items()}
    torch.save({"model_state_dict": wrapped}, folder / f"{WEIGHTS}.pt")
    return folder


def test_the_purifier_and_the_classifier_are_those_of_the_files(published):
    loaded = recipe("carso/cifar10").load(published, published / f"{WEIGHTS}.pt")
    assert loaded.samples == 8 and not loaded.training
    weights = torch.load(published / f"{WEIGHTS}.pt", weights_only=True)["model_state_dict"]
    assert torch.equal(loaded.classifier.logits.weight, weights["module.0.logits.weight"])


def test_files_that_do_not_fit_are_named(published):
    with pytest.raises(ValueError, match=r"recipe must be one of cifar10, cifar100, tiny_imagenet, .*'carso/mnist_v1'"):
        recipe("carso/mnist_v1").load(published, published / f"{WEIGHTS}.pt")
    save_file({"init_conv.weight": torch.zeros(1)}, published / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the classifier of this system: .*missing"):
        recipe("carso/cifar10").load(published, published / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipe("carso/cifar10").load(published, published / "nowhere.pt")
