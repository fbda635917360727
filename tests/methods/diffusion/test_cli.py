"""Denoisers on the command line: trained, put before a classifier, resumed; and what is refused, how."""

import pytest
from small_models import bars_and_classifier

from purify_fast import cli

FEW = ["--images", "4", "--steps", "2", "--eot-iter", "2", "--protocol", "fast"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of a user's own, two classes, grey, 16 x 8, and a classifier for them."""
    return bars_and_classifier(tmp_path_factory.mktemp("diffusion"))


def run(made, command, *options):
    return cli.main([*command.split(), "--data", str(made / "bars.npz"), "--device", "cpu", *map(str, options)])


def train(made, out, *options):
    """``train diffusion`` for an epoch of four steps; the exit status."""
    return run(made, "train diffusion", "--out", out, "--epochs", 1, "--batch-size", 16, *options)


@pytest.fixture(scope="module")
def denoiser(made):
    options = ["--width", 4, "--patch", 2, "--no-attention", "--noise-schedule", "cosine", "--prediction", "v"]
    assert train(made, made / "denoiser", *options, "--last-time", 0.6, "--precision", "bfloat16") == 0
    return made / "denoiser"


def test_what_is_refused(made, denoiser, tmp_path, capsys):
    def refused(command, *options):
        try:
            code = run(made, command, *options)
        except SystemExit as error:
            code = error.code
        assert code == 2
        # tyro draws a box around a message.
        said = capsys.readouterr()
        return " ".join(word for word in (said.err + said.out).split() if word[0] not in "│╭╮╰╯─")

    train_to = f"train diffusion --out {tmp_path / 'out'}"
    classifier = ["--classifier", made / "classifier"]
    assert "width must be even and at most 16, or a multiple of 16, got 17" in refused(train_to, "--width", 17)
    assert not (tmp_path / "out").exists()
    evaluate = f"evaluate {denoiser}"
    assert f"--classifier must be given: {denoiser} contains a part of a defence" in refused(evaluate, "--eps", 0.1)
    assert "--eps must be given" in refused(evaluate, *classifier)
    assert "t_star must be at most 0.6" in refused(evaluate, "--eps", 0.1, *classifier, "--t-star", 0.7)
    own = refused(f"evaluate {made / 'classifier'}", "--eps", 0.1, "--t-star", 0.1)
    assert f"--solver are only for a saved defence, got {made / 'classifier'}" in own
