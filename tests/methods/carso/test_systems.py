"""The published systems: their sizes layer by layer, and that they run."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import Made, smaller, with_statistics, write_official
from torch import nn

from purify_fast.methods.carso import Carso, load_official
from purify_fast.methods.carso.networks import published_decoder
from purify_fast.methods.carso.recipes import PARTS, RECIPES, official_tensors
from purify_fast.methods.recipes import all_recipes, recipe
from purify_fast.models.classifiers import SmallCNN, WideResNet


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(name):
    """The whole system, without its memory."""
    with torch.device("meta"):
        return RECIPES[name].defence(RECIPES[name].build_classifier())


@pytest.fixture(scope="module")
def systems():
    return {name: on_meta(name) for name in RECIPES}


@pytest.mark.parametrize(
    ("name", "counts"),
    # fact 2, per map size: (layers, channels, size)
    [
        ("cifar10", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
        ("cifar100", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
        ("tiny_imagenet", [(8, 160, 64), (9, 320, 32), (9, 640, 16)]),
    ],
)
def test_fact_2_the_26_representation_tensors(systems, name, counts):
    want = [(channels, size, size) for n, channels, size in counts for _ in range(n)]
    shapes = systems[name].representation.shapes
    assert shapes == want and len(shapes) == 26
    total = 9_666_560 if name == "tiny_imagenet" else 2_416_640
    assert sum(c * h * w for c, h, w in shapes) == total
    with torch.device("meta"):
        encoder = systems[name].condition_encoder
        outputs = [layer[:-1](torch.empty(2, *shape)) for layer, shape in zip(encoder.layers, shapes, strict=True)]
    kept = [tuple(out.shape[1:]) for out in outputs]
    if name == "tiny_imagenet":
        assert kept == [(10, 56, 56)] * 8 + [(20, 24, 24)] * 9 + [(40, 8, 8)] * 9
    else:
        assert kept == [(20, 26, 26)] * 8 + [(40, 10, 10)] * 9 + [(80, 2, 2)] * 9
    flat = 377_600 if name == "tiny_imagenet" else 147_040
    assert sum(out[0].numel() for out in outputs) == flat == encoder.joint[0].in_features


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # the posterior encoder's image part, pre-encoders 0, 8 and 25, all, joint, posterior, heads, decoder
        ("cifar10", [846, 151_480, 605_360, 2_420_320, 28_442_960, 75_285_504, 164_096, 33_024, 2_455_107]),
        ("tiny_imagenet", [846, 153_300, 612_600, 2_449_200, 28_782_600, 289_998_336, 737_664, 74_112, 4_914_979]),
    ],
)
def test_fact_3_parameters_of_the_purifiers(systems, name, counts):
    made = systems[name]
    encoder, posterior = made.condition_encoder, made.posterior_encoder
    parts = [posterior.image, *(encoder.layers[i] for i in (0, 8, 25)), encoder.layers, encoder.joint, posterior.joint]
    parts += [nn.ModuleList([posterior.mean, posterior.log_variance]), made.decoder]
    assert [parameters(part) for part in parts] == counts
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == counts[0] + sum(counts[4:])


@pytest.mark.parametrize(
    ("part", "count", "want"),
    [
        ("repr_compressors", 468, "5c12a84cd70f9bf553713d3d6d9083f02afb0ee95ce498c65bf77af5769427eb"),
        ("repr_fcn_compressor", 6, "35f5d7b74c7e854b8d0e4b6280765f6d290f39dedc2283d3328c70da85141a20"),
        ("decoder", 28, "4a958939e6bc047ceffb423996cc38a4aed602f0f07206234259fcb075ec284b"),
    ],
)
def test_full_size_tensors_have_the_official_names_and_shapes(systems, part, count, want):
    state = official_tensors(systems["cifar10"])[part]
    names = sorted((name, tuple(tensor.shape)) for name, tensor in state.items())
    assert len(names) == count
    assert hashlib.sha256(repr(names).encode()).hexdigest() == want


# -- the official files: read under the official names, and what happens with files that do not fit --------------------


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


# -- A system with its authors' weights, here with files of small shapes -----------------------------------------------


WIDE, WEIGHTS = "wrn_28_10_cifar_10_cui_2023", "cifar10_a3_b10_t4_20m_w"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The four files of a system; a network of 10 layers stands for the one of 28."""
    made = smaller(RECIPES["cifar10"])
    monkeypatch.setitem(all_recipes(), made.name, made)
    torch.manual_seed(0)
    classifier = made.build_classifier()
    folder = tmp_path / "models"
    write_official(made.defence(classifier), folder, WIDE)
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
    save_file({"init_conv.weight": torch.zeros(1)}, published / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the classifier of this system: .*missing"):
        recipe("carso/cifar10").load(published, published / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipe("carso/cifar10").load(published, published / "nowhere.pt")
