"""`purify-fast evaluate --official`: the published CARSO weights in one command, here with files of small shapes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import smaller

from purify_fast.cli.evaluate import Evaluate
from purify_fast.cli.run_file import parse
from purify_fast.evaluation import Report
from purify_fast.methods.carso import save_official
from purify_fast.methods.carso.recipes import RECIPES
from purify_fast.methods.recipes import recipe

pytestmark = pytest.mark.usefixtures("one_thread")
STEM, WEIGHTS = "wrn_28_10_cifar_10_cui_2023", "cifar10_a3_b10_t4_20m_w"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The four files of a system, and images; a network of 10 layers stands for the one of 28."""
    made = smaller(RECIPES["cifar10"])
    monkeypatch.setitem(RECIPES, "cifar10", made)
    torch.manual_seed(0)
    classifier = made.build_classifier()
    folder = tmp_path / "models"
    save_official(made.defence(classifier), folder, STEM)
    # as the authors' code saves it: around the network stand DataParallel and a Sequential
    wrapped = {f"module.0.{name}": tensor for name, tensor in classifier.state_dict().items()}
    torch.save({"model_state_dict": wrapped}, folder / f"{WEIGHTS}.pt")
    x = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    y = np.arange(12) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return folder


def evaluated(run, folder, *words):
    common = ["evaluate", "--official", folder, "--recipe", "cifar10", "--data-root", folder.parent, "--device", "cpu"]
    attacks = ["--steps", "1", "--eot-iter", "1", "--protocol", "fast", "--images", "1"]
    return run(*common, *attacks, *words)


@pytest.mark.slow
def test_the_published_files_are_judged_in_one_command(published, run, short_signs):
    code, said = evaluated(run, published)
    assert code == 0, said
    report = Report.from_json((published / "evaluation" / "report.json").read_text())
    assert report.models == ["CARSO, its authors' weights, cifar10"]
    assert report.about["dataset"] == "cifar10" and report.about["threat"] == "L-inf 8/255"
    assert {row.kind for row in report.rows} >= {"clean", "apgd", "pgd", "worst"}
    assert "transfer from the base" in report.attacks and (published / "evaluation" / "report.html").is_file()


def test_the_classifier_may_lie_elsewhere(published, run, tmp_path):
    (path,) = published.glob("*.pt")
    elsewhere = path.rename(tmp_path / "mine.pt")
    code, said = evaluated(run, published)
    assert code == 2 and "with the weights of the classifier" in said
    assert "cifar10_a3_b10_t4_20m_w" in said and "--classifier-weights" in said
    words = ["--official", published, "--recipe", "cifar10", "--classifier-weights", elsewhere, "--device", "cpu"]
    command = parse(Evaluate, [str(word) for word in [*words, "--data-root", published.parent]])
    model, base = command.loaded(command.load_data())
    assert model.classifier is base and model.samples == 8 and not model.training
    weights = torch.load(elsewhere, weights_only=True)["model_state_dict"]
    assert torch.equal(base.logits.weight, weights["module.0.logits.weight"])


def test_files_that_do_not_fit_are_named(published):
    with pytest.raises(ValueError, match=r"recipe must be one of cifar10, cifar100, tiny_imagenet, .*'carso/mnist_v1'"):
        recipe("carso/mnist_v1").load(published)
    save_file({"init_conv.weight": torch.zeros(1)}, published / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the classifier of this system: .*missing"):
        recipe("carso/cifar10").load(published, published / "other.safetensors")
    (published / f"{WEIGHTS}.pt").rename(published / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"got a\.pt, other\.safetensors"):
        recipe("carso/cifar10").load(published)
