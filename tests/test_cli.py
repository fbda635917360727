"""The command line end to end on a set of the user's own: two classes, grey, not square, in a .npz file."""

import json

import numpy as np
import pytest
import torch

import purify_fast
from purify_fast import cli, demo
from purify_fast.evaluation import Report, Row
from purify_fast.training import load_classifier


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    state = np.random.RandomState(0)

    def split(n):
        y = np.arange(n) % 2
        x = state.randint(0, 120, (n, 12, 8))
        x[y == 0, :6] += 100
        x[y == 1, 6:] += 100
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = split(128), split(24)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return str(path)


def test_train_and_evaluate(npz, tmp_path, capsys):
    classifier, carso = str(tmp_path / "classifier"), str(tmp_path / "carso")
    common = ["--data", npz, "--device", "cpu", "--batch-size", "32"]
    train = ["--eps", "0.1", "--steps", "2", *common]
    assert cli.main(["train", "classifier", "--out", classifier, "--width", "4", "--epochs", "8", *train]) == 0
    assert "clean" in capsys.readouterr().out
    paths = ["--classifier", classifier, "--out", carso, "--layers", "conv2", "hidden"]
    assert cli.main(["train", "carso", *paths, "--epochs", "3", *train]) == 0
    fine = [*paths[:3], carso + "-fine", "--init", carso, "--attack-target", "pipeline"]
    fine += ["--precision", "bfloat16"]
    assert cli.main(["train", "carso", *fine, "--epochs", "1", *train]) == 0
    evaluate = ["--data", npz, "--device", "cpu", "--eps", "0.1", "--images", "12", "--steps", "3", "--eot", "2"]
    assert cli.main(["evaluate", carso + "-fine", *evaluate, "--autoattack", "0"]) == 0
    assert "transfer from the base" in capsys.readouterr().out
    rounded = ["--precision", "bfloat16", "--autoattack", "0"]
    assert cli.main(["evaluate", carso, *evaluate, *rounded]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", classifier, *evaluate, *rounded]) == 2
    assert "precision bfloat16 is for defences" in capsys.readouterr().err
    written = tmp_path / "carso-fine" / "evaluation"
    report = Report.from_json((written / "report.json").read_text())
    assert report.row("clean").n == 12 and (written / "report.md").is_file() and (written / "accuracies.png").is_file()
    defence = purify_fast.load(carso, load_classifier(classifier))
    assert defence(torch.rand(2, 1, 12, 8)).shape == (2, 2)
    log = [json.loads(line) for line in (tmp_path / "carso" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1, 2] and log[-1]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "classifier", "--data", "nowhere.npz"], "nowhere.npz"),
        (["train", "carso", "--classifier", "nowhere"], "nowhere"),
        (["train", "classifier", "--epochs", "0"], "epochs"),
        (["evaluate", "nowhere"], "model.json is missing"),
    ],
)
def test_input_that_cannot_be_used_is_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # refused while reading the arguments
        code = stop.code
    assert code == 2
    said = capsys.readouterr()
    assert message in said.err + said.out and "Traceback" not in said.err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "aggregate" in out and torch.__version__ in out


def test_the_demos_sentences_follow_the_numbers():
    def report(model, robust, auto, **rows):
        made = Report()
        for attack, mask in {"clean": [1] * 8, "worst": robust, demo.AUTOATTACK: auto, **rows}.items():
            mask = np.array(mask, dtype=bool)
            made.rows.append(Row(model, attack, "x", "random", mask, mask.mean(), mask.mean(), 1, 0, 0.0, "d"))
        return made

    def ones(n):
        return [1] * n + [0] * (8 - n)

    reports = {
        demo.BASE: report(demo.BASE, ones(3), ones(2)),
        demo.PUBLISHED: report(demo.PUBLISHED, ones(1), ones(0), **{demo.PEEL: ones(7)}),
        demo.PIPELINE: report(demo.PIPELINE, ones(7), ones(1)),
    }
    reports[demo.PUBLISHED].row(demo.PEEL).reliable = False
    text = "\n".join(demo.conclusion(reports, demo.Budget()))
    assert "seems to withstand 87.5 ± 11.7 %" in text and "unreliable" in text and "QUICK" not in text
    assert "+50.0 ± 17.7 points (n = 8, paired), better than its base" in text
    assert "-12.5 ± 11.7 points (n = 8, paired), not told from its base" in text
    reports[demo.PUBLISHED].row(demo.PEEL).reliable = True
    reports[demo.PIPELINE] = report(demo.PIPELINE, ones(0), ones(0))
    reports[demo.BASE] = report(demo.BASE, ones(8), ones(8))
    text = "\n".join(demo.conclusion(reports, demo.QUICK, quick=True))
    assert "worse than its base" in text and "believable" in text and "QUICK" in text
