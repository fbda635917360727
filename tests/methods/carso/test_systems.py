"""The published systems: their sizes layer by layer, and that they run. The tests of CARSO's training follow."""

import copy
import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import Made, carso, first_digits, smaller, with_statistics, write_official
from torch import nn

from purify_fast import data
from purify_fast.attacks import FGSM, PGD, AttackResult
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask, load_official
from purify_fast.methods.carso.networks import published_decoder
from purify_fast.methods.carso.recipes import PARTS, RECIPES, official_tensors
from purify_fast.methods.recipes import all_recipes, recipe
from purify_fast.models.classifiers import SmallCNN, WideResNet
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(name):
    """The whole system, without its memory."""
    with torch.device("meta"):
        return RECIPES[name].defence(RECIPES[name].build_classifier())


@pytest.fixture(scope="module")
def systems():
    return {name: on_meta(name) for name in RECIPES}


# fact 2, per map size: (layers, channels, size)
TENSORS = [
    ("cifar10", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
    ("cifar100", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
    ("tiny_imagenet", [(8, 160, 64), (9, 320, 32), (9, 640, 16)]),
]


@pytest.mark.parametrize(("name", "counts"), TENSORS)
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


PARAMETERS = [
    # the posterior encoder's image part, pre-encoders 0, 8 and 25, all, joint, posterior, heads, decoder
    ("cifar10", [846, 151_480, 605_360, 2_420_320, 28_442_960, 75_285_504, 164_096, 33_024, 2_455_107]),
    ("tiny_imagenet", [846, 153_300, 612_600, 2_449_200, 28_782_600, 289_998_336, 737_664, 74_112, 4_914_979]),
]


@pytest.mark.parametrize(("name", "counts"), PARAMETERS)
def test_fact_3_parameters_of_the_purifiers(systems, name, counts):
    made = systems[name]
    encoder, posterior = made.condition_encoder, made.posterior_encoder
    parts = [posterior.image, *(encoder.layers[i] for i in (0, 8, 25)), encoder.layers, encoder.joint, posterior.joint]
    parts += [nn.ModuleList([posterior.mean, posterior.log_variance]), made.decoder]
    assert [parameters(part) for part in parts] == counts
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == counts[0] + sum(counts[4:])


DIGESTS = [
    ("repr_compressors", 468, "5c12a84cd70f9bf553713d3d6d9083f02afb0ee95ce498c65bf77af5769427eb"),
    ("repr_fcn_compressor", 6, "35f5d7b74c7e854b8d0e4b6280765f6d290f39dedc2283d3328c70da85141a20"),
    ("decoder", 28, "4a958939e6bc047ceffb423996cc38a4aed602f0f07206234259fcb075ec284b"),
]


@pytest.mark.parametrize(("part", "count", "want"), DIGESTS)
def test_full_size_tensors_have_the_official_names_and_shapes(systems, part, count, want):
    state = official_tensors(systems["cifar10"])[part]
    names = sorted((name, tuple(tensor.shape)) for name, tensor in state.items())
    assert len(names) == count and hashlib.sha256(repr(names).encode()).hexdigest() == want


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


UNFIT_FILES = [
    ("repr_compressors", lambda t: t.pop("3.1.1.bias"), r"does not fit .*: 3\.1\.1\.bias is missing"),
    ("decoder", lambda t: t.update({"3.1.bias": torch.zeros(9)}), r"3\.1\.bias is \[9\], must be \[64\]"),
    ("decoder", lambda t: t.update({"0.1.weight": torch.zeros(9, 10)}), "must hold the three files"),
]


@pytest.mark.parametrize(("part", "change", "message"), UNFIT_FILES)
def test_files_that_do_not_fit_are_named_with_their_tensors(cifar, files, part, change, message):
    rewrite(files / f"{STEM}_{part}.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_official(cifar.classifier, files)


def test_the_statistics_are_the_classifiers_own(cifar, files):
    assert load_official(cifar.classifier, files).arguments["std"] == cifar.arguments["std"]

    # with tensors for attributes, as RobustBench's models have them
    statistics = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}
    around = Made(lambda self, x: self.model(x), model=cifar.classifier, **statistics)
    theirs = load_official(around, files, layers=[f"model.{name}" for name in cifar.representation.layers])
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


# -- training ----------------------------------------------------------------------------------------------------------
# CARSO's training: the paper's schedules and batches, and the losses.


def batch(n=16, epoch=5, epochs=10):
    x, y = first_digits(n)
    return Batch(data.to_float(x), y, torch.arange(n), 7, epoch, epochs)


LAYOUTS = [(640, 0.5, 320, 80), (640, 0.15, 544, 24), (128, 0.01, 128, 0), (128, 0.04, 124, 1), (1024, 0.01, 1016, 2)]


@pytest.mark.parametrize(("size", "fraction", "clean", "atom"), LAYOUTS)
def test_fact_12_batch_layouts(size, fraction, clean, atom, monkeypatch):
    calls = []

    def record(attack, model, x, y, context):
        calls.append(context.eps.tolist())
        return AttackResult(x + 10)

    for kind in (PGD, FGSM):
        monkeypatch.setattr(kind, "run", record)
    x, y = torch.rand(size, 1, 2, 2), torch.zeros(size, dtype=torch.int64)
    attack = TrainingAttack(eps=0.2, steps=40)
    config = CarsoConfig(attack=attack, adversarial_fraction=fraction, allow_no_adversarial=True)
    out = CarsoTask(carso(), config).balanced_batch(Batch(x, y, torch.arange(size), 0), config)
    assert torch.equal(out[:clean], x[:clean]) and torch.equal(out[clean:], x[clean:] + 10)
    assert calls == ([pytest.approx([0.1] * atom + [0.2] * atom)] * 2 if atom else []) and clean + 4 * atom == size


def test_without_adversarial_examples_only_if_asked():
    made, b = carso(), batch(16)
    config = CarsoConfig(attack=TrainingAttack(eps=0.2, steps=1), adversarial_fraction=0.01)
    with pytest.raises(ValueError, match=r"0\.01 of 16 images is too few for 4 attacks"):
        CarsoTask(made, config).training_step(b)
    config = dataclasses.replace(config, allow_no_adversarial=True)
    x = CarsoTask(made, config).balanced_batch(b, config)
    assert torch.equal(x, b.x) and CarsoTask(made, config).training_step(b)[0].isfinite()


def test_published_loss_is_reconstruction_plus_weighted_kl():
    made, b = carso(), batch(epoch=0)
    loss, terms = CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2))).training_step(b)
    torch.testing.assert_close(loss.detach(), terms["reconstruction"])  # epoch 0: no KL yet
    task = CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), beta=0.5))
    loss, terms = task.training_step(batch(epoch=9))
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + 0.5 * terms["kl"])
    assert terms["kl"] > 0


def test_official_code_attacks_with_a_larger_eps_and_the_same_step(monkeypatch):
    seen = []
    monkeypatch.setattr(CarsoTask, "balanced_batch", lambda self, batch, config: seen.append(config) or batch.x)
    torch.manual_seed(0)
    statistics = {"mean": (0.4, 0.4, 0.4), "std": (0.25, 0.2, 0.3)}
    made = Carso(SmallCNN(3, 10, (16, 16), 4), ["conv2"], (3, 16, 16), 8, 4, 2, decoder_width=2, **statistics)
    b = batch()
    colour = dataclasses.replace(b, x=b.x.expand(-1, 3, -1, -1))
    config = CarsoConfig(attack=TrainingAttack(eps=0.1, steps=2, alpha=0.2), eps_mode="official_code")
    CarsoTask(made, config).training_step(colour)
    CarsoTask(made, dataclasses.replace(config, eps_mode="paper")).training_step(colour)
    assert [c.attack.eps for c in seen] == pytest.approx([0.1 * 3 / 0.75, 0.1])
    assert all(c.attack.step_size(c.attack.eps) == 0.2 for c in seen)


def test_the_pipeline_loss_reaches_what_inference_uses_and_keeps_mode_samples_and_statistics():
    made = carso().train()
    state = copy.deepcopy(made.state_dict())
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=2), train_samples=3)
    CarsoTask(made, config).training_step(batch())[0].backward()
    for name, p in made.named_parameters():
        assert (p.grad is not None) == name.startswith(("condition_encoder", "decoder")), name
    assert made.training and made.samples == 2 and all(torch.equal(state[k], v) for k, v in made.state_dict().items())


def test_pipeline_examples_are_made_against_the_whole_defence(monkeypatch):
    seen, run = [], PGD.run
    monkeypatch.setattr(PGD, "run", lambda attack, model, *given: seen.append(model) or run(attack, model, *given))
    made = carso()
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1))
    CarsoTask(made, config).training_step(batch())
    CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=1))).training_step(batch())
    assert seen[0].decoder is made.decoder and seen[0].samples == 1 and seen[1] is made.classifier
