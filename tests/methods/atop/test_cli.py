"""AToP on the command line: made, trained, started from another, resumed, evaluated; and what is refused, how."""

import pytest
import torch
from small_models import bars_and_classifier

import purify_fast
from purify_fast import cli
from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.carso import Carso
from purify_fast.training import load_classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of a user's own, two classes, grey, 16 x 8, and a classifier for them."""
    return bars_and_classifier(tmp_path_factory.mktemp("atop"))


def run(what, made, out, *options):
    """``train generator`` or ``train atop`` for an epoch of four steps; the exit status."""
    common = ["--data", str(made / "bars.npz"), "--classifier", str(made / "classifier"), "--device", "cpu"]
    if what == "atop" and "--cls-delay" not in options:
        # four steps are shorter than the usual delay
        options = (*options, "--cls-delay", "0")
    return cli.main(["train", what, "--out", str(out), *common, "--epochs", "1", "--batch-size", "16", *options])


@pytest.fixture(scope="module")
def generator(made):
    """A folder of `train generator`."""
    options = ["--width", "2", "--transform", "rt3", "--sigma", "0.1", "--block", "4", "--discriminator-width", "2"]
    assert run("generator", made, made / "generator", *options) == 0
    return made / "generator"


def test_a_published_checkpoint_is_what_training_starts_from(made, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "states.pth"
    torch.save({"G": DeepFillGenerator(3, 4).state_dict()}, path)
    options = ["--init", "None", "--purifier", "deepfill", "--weights", str(path), "--learning-rate", "0"]
    transform = ["--transform", "rt2", "--sigma", "0.2", "--block", "4", "--mask-ratio", "0.5", "--samples", "2"]
    transform += ["--aggregation", "mean_softmax", "--shared-mask"]
    assert run("atop", made, tmp_path / "out", *options, "--cls-delay=0", *transform) == 0
    loaded, wanted = purify_fast.load_defence(tmp_path / "out"), DeepFillGenerator.from_official(path).state_dict()
    assert loaded.purifier.module.arguments["width"] == 4 and loaded.shared_mask and loaded.samples == 2
    assert (loaded.sigma, loaded.block, loaded.mask_ratio, loaded.aggregation) == (0.2, 4, 0.5, "mean_softmax")
    assert loaded.arguments["transform"] == "rt2"
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.purifier.module.state_dict().items())
    assert run("atop", made, tmp_path / "other", *options, "--width", "4") == 2
    assert "--width has no effect beside --weights" in capsys.readouterr().err
    assert run("atop", made, tmp_path / "other", *options, "--weights", str(tmp_path / "none.pth")) == 2
    assert "none.pth" in capsys.readouterr().err


def test_folders_of_another_kind_are_refused(made, generator, tmp_path, capsys, monkeypatch):
    classifier = load_classifier(made / "classifier")
    carso = tmp_path / "carso"
    Carso(classifier, ["conv2"], (1, 16, 8), 4, 2, 2, decoder_width=2).save(carso)
    monkeypatch.chdir(tmp_path)

    def refused(what, *options):
        assert run(what, made, tmp_path / "out", *options) == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    other = f"{generator} must contain a saved Carso, but it contains a Atop"
    assert other in refused("carso", "--init", str(generator))
    assert f"{carso} must contain a saved Atop" in refused("atop", "--init", str(carso))
    kind = f"{made / 'classifier'} holds a 'SmallCNN', not a known defence: if it is a classifier,"
    assert kind in refused("atop", "--init", str(made / "classifier"))
    for what in ("generator", "atop", "carso"):
        assert f"{carso} holds a 'Carso', not a classifier" in refused(what, "--classifier", str(carso))
    assert "runs/generator is missing: run `purify-fast train generator` first" in refused("atop")
    assert cli.main(["evaluate", str(carso), "--data", str(made / "bars.npz"), "--device", "cpu"]) == 2
    assert f"{carso / 'classifier' / 'model.safetensors'} is missing" in capsys.readouterr().err
