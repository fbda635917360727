"""The official files: read under the official names, and what happens with files that do not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import Made, with_statistics, write_official

from purify_fast.methods.carso import Carso, load_official
from purify_fast.methods.carso.networks import published_decoder
from purify_fast.methods.carso.recipes import PARTS, official_tensors
from purify_fast.models.classifiers import SmallCNN, WideResNet

STEM = "wrn_28_10_cifar_10_cui_2023"


def system(size=32, width=1, seed=0, classes=10):
    """A published system but for the width of its classifier, its condition and its latent."""
    torch.manual_seed(seed)
    classifier = WideResNet(28, width, classes)
    shape = (3, size, size)
    statistics = {name: classifier.normalize.arguments[name] for name in ("mean", "std")}
    options = {"encoder_depth": 3 if size == 32 else 4, "decoder": published_decoder(shape), **statistics}
    made = Carso(classifier, classifier.representation_layers(), shape, 6, 4, **options)
    return with_statistics(made).eval()


@pytest.fixture(scope="module")
def cifar():
    return system()


@pytest.fixture
def files(cifar, tmp_path):
    write_official(cifar, tmp_path, STEM)
    return tmp_path


def test_the_files_hold_the_official_names(cifar, files):
    assert sorted(path.name for path in files.iterdir()) == sorted(f"{STEM}_{part}.safetensors" for part in PARTS)
    decoder = load_file(files / f"{STEM}_decoder.safetensors")
    assert torch.equal(decoder["0.1.weight"], cifar.decoder.adapter.weight)
    assert torch.equal(decoder["2.0.weight"], cifar.decoder.stack[3].weight)
    assert torch.equal(decoder["2.1.running_var"], cifar.decoder.stack[4].running_var)
    assert torch.equal(decoder["5.bias"], cifar.decoder.stack[12].bias)
    compressors = load_file(files / f"{STEM}_repr_compressors.safetensors")
    assert torch.equal(compressors["25.2.0.weight"], cifar.condition_encoder.layers[25][2][0].weight)
    joint = load_file(files / f"{STEM}_repr_fcn_compressor.safetensors")
    assert torch.equal(joint["1.1.running_mean"], cifar.condition_encoder.joint[1].running_mean)


@pytest.mark.parametrize("size", [32, 64])
def test_a_round_trip_keeps_every_tensor_and_the_function(size, tmp_path):
    made = system(size, classes=7)
    write_official(made, tmp_path, "a")
    loaded = load_official(made.classifier, tmp_path)
    before, after = (official_tensors(d) for d in (made, loaded))
    for part in PARTS:
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
    assert loaded.arguments == made.arguments and loaded.num_classes == 7 and not loaded.training
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(), made.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(made(x), loaded(x))
    assert not torch.equal(made.posterior_encoder.mean.weight, loaded.posterior_encoder.mean.weight)  # fresh


def test_one_of_several_systems_is_chosen_by_its_stem(cifar, files):
    write_official(system(seed=1), files, "other")
    with pytest.raises(ValueError, match=f"if stem is None, got other, {STEM}"):
        load_official(cifar.classifier, files)
    loaded = load_official(cifar.classifier, files, STEM, samples=3)
    assert torch.equal(loaded.decoder.adapter.weight, cifar.decoder.adapter.weight) and loaded.samples == 3


def test_any_classifier_by_its_layers(tmp_path):
    torch.manual_seed(0)
    classifier, layers = SmallCNN(3, 4, (32, 32), 16), ["conv1", "conv2"]
    made = Carso(classifier, layers, (3, 32, 32), 6, 4, decoder=published_decoder((3, 32, 32)))
    write_official(made, tmp_path, "small")
    with pytest.raises(ValueError, match="layers must be given for a SmallCNN"):
        load_official(classifier, tmp_path)
    with pytest.raises(ValueError, match=r"layers must have 2 paths, .*small_repr_compressors.safetensors, got 1"):
        load_official(classifier, tmp_path, layers=layers[:1])
    assert load_official(classifier, tmp_path, layers=layers).num_classes == 4


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("repr_compressors", lambda t: t.pop("3.1.1.bias"), r"does not fit .*: 3\.1\.1\.bias is missing"),
        ("decoder", lambda t: t.update({"3.1.bias": torch.zeros(9)}), r"3\.1\.bias is \[9\], must be \[64\]"),
        ("decoder", lambda t: t.update({"0.1.weight": torch.zeros(9, 10)}), "must hold the three files"),
    ],
)
def test_files_that_do_not_fit_are_named_with_their_tensors(cifar, files, part, change, message):
    rewrite(files / f"{STEM}_{part}.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_official(cifar.classifier, files)


def test_the_statistics_are_the_classifiers_own(cifar, files):
    assert load_official(cifar.classifier, files).arguments["std"] == cifar.arguments["std"]

    # with tensors for attributes, as RobustBench's models have them
    statistics = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}
    around = Made(lambda self, x: self.model(x), model=cifar.classifier, **statistics)
    layers = [f"model.{name}" for name in cifar.representation.layers]
    theirs = load_official(around, files, layers=layers)
    assert theirs.arguments["mean"] == pytest.approx([0.4] * 3) and theirs.arguments["std"] == pytest.approx([0.2] * 3)
