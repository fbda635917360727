"""ARREST on the command line starts from the classifier that is given."""

from small_models import bars_and_classifier

from purify_fast import cli
from purify_fast._settings import weights_fingerprint
from purify_fast.cli.command import parse
from purify_fast.methods.recipes import recipe
from purify_fast.training import load_classifier


def test_it_keeps_the_weights_of_the_given_classifier_where_the_rate_is_0(tmp_path):
    bars_and_classifier(tmp_path)
    words = ["train", "arrest", "--classifier", str(tmp_path / "classifier"), "--data", str(tmp_path / "bars.npz")]
    words += ["--device", "cpu", "--epochs", "1", "--batch-size", "16", "--steps", "1", "--weight-decay", "0"]
    for rate in ("0.1", "0"):
        assert cli.main([*words, "--learning-rate", rate, "--out", str(tmp_path / rate)]) == 0
    before, moved, still = (
        weights_fingerprint(load_classifier(tmp_path / name)) for name in ("classifier", "0.1", "0")
    )
    assert before == still != moved


def test_the_rate_is_in_proportion_to_the_batch():
    command = cli._KINDS["train arrest"]
    rates = [parse(command, words).method.learning_rate for words in ([], ["--batch-size", "16"])]
    assert rates == [0.025, 0.025 / 8]
    given = parse(command, ["--batch-size", "16", "--learning-rate", "0.1"])
    assert given.method.learning_rate == 0.1
    published = parse(command, ["--recipe", "resnet18", "--batch-size", "64"])
    assert published.method.learning_rate == 0.025 * 64 / recipe("arrest/resnet18")["loop.batch_size"]
