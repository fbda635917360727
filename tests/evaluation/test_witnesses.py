"""Images that fell are kept with a report, exactly, and are tried again by anybody."""

import json

import digit_nets
import pytest
import torch
from evaluating import evaluate
from small_models import Made

from purify_fast import cli
from purify_fast.attacks import APGD, PGD
from purify_fast.evaluation import check_witnesses
from purify_fast.evaluation.show.witnesses import FILE, Witnesses


def saved(folder, model=None, **options):
    x, y = digit_nets.digits()[2:]
    options = {"eps": digit_nets.EPS, "attacks": [PGD(steps=5)], "keep": "all"} | options
    model = digit_nets.standard() if model is None else model
    report = evaluate(model, x[:40], y[:40], **options)
    report.save(folder)
    return report


@pytest.mark.parametrize(("norm", "eps"), [("linf", digit_nets.EPS), ("l2", 1.0), ("l1", 6.0)])
def test_every_image_that_fell_is_kept_as_the_model_saw_it(tmp_path, norm, eps):
    report = saved(tmp_path, eps=eps, norm=norm, attacks=[PGD(steps=2), APGD(steps=10)])
    fell = report.row("clean").robust & ~report.row("worst").robust
    kept, read = report.witnesses, Witnesses.load(tmp_path)
    assert fell.any() and sorted(kept.numbers.tolist()) == fell.nonzero()[0].tolist()
    for name in ("clean", "adversarial", "labels", "numbers", "margins", "attacks"):
        assert torch.equal(getattr(read, name), getattr(kept, name)), name
    x, y = digit_nets.digits()[2:]
    assert torch.equal(kept.clean, x[kept.numbers]) and torch.equal(kept.labels, y[kept.numbers])
    assert (digit_nets.standard()(kept.adversarial).argmax(1) != kept.labels).all()
    # the pictures are those of a report that keeps some
    some = evaluate(digit_nets.standard(), x[:40], y[:40], eps=eps, norm=norm, attacks=[PGD(steps=2)])
    assert some.witnesses is None
    assert (some.row("PGD-2 ce").examples.adversarial == report.row("PGD-2 ce").examples.adversarial).all()


@pytest.mark.slow
def test_another_model_is_told_and_what_no_longer_falls(tmp_path, capsys):
    report = saved(tmp_path)
    same = check_witnesses(tmp_path, digit_nets.standard())
    assert same.confirmed and same.same_model and same.falls.sum() == len(report.witnesses)
    other = check_witnesses(tmp_path, digit_nets.robust())
    assert not other.confirmed and other.same_model is False and "weights" in other.model
    first = int((~other.falls).nonzero()[0][0])
    assert f"no longer falls: image {other.witnesses.numbers[first]} (PGD-5 ce" in other.to_text()
    # a function has nothing to compare
    assert check_witnesses(tmp_path, lambda x: digit_nets.standard()(x)).same_model is None


def test_what_changed_since_the_report_is_told(tmp_path):
    """An image, or the ball of an attack; the file has a checksum that is right."""
    report, model = saved(tmp_path), digit_nets.standard()
    checked = check_witnesses(tmp_path, model)
    assert checked.confirmed and f"every witness lies in its ball ({report.about['threat']})" in checked.to_text()
    witnesses = Witnesses.load(tmp_path)
    witnesses.adversarial[3] += 0.5
    witnesses.save(tmp_path)
    checked = check_witnesses(tmp_path, model)
    assert not checked.confirmed
    assert checked.changed.nonzero()[0].tolist() == checked.outside.nonzero()[0].tolist() == [3]
    assert f"changed since the report was saved: image {checked.witnesses.numbers[3]}" in checked.to_text()
    for attack in witnesses.about["attacks"]:
        attack["eps"] = 1.0
    witnesses.save(tmp_path)
    assert check_witnesses(tmp_path, model).changed.all()


def test_damaged_and_missing_files_are_refused(tmp_path, capsys):
    saved(tmp_path)
    words = ["check", str(tmp_path), "zoo:digits-standard", "--device", "cpu"]
    path = tmp_path / FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        check_witnesses(tmp_path, digit_nets.standard())
    assert cli.main(words) == 2
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"report\.witnesses"):
        check_witnesses(tmp_path, digit_nets.standard())
    # a report that keeps some removes the file of the one before it
    saved(tmp_path)
    saved(tmp_path, keep="some")
    assert not path.exists() and "witnesses" not in json.loads((tmp_path / "report.json").read_text())
    with pytest.raises(ValueError, match="keep"):
        check_witnesses(tmp_path, digit_nets.standard())
    assert cli.main(words) == 2 and cli.main(["check", str(tmp_path / "nowhere"), *words[2:]]) == 2


def noisy():
    """The standard network, with noise on its logits."""
    return Made(lambda self, x: (z := self.net(x)) + 2 * torch.randn_like(z), net=digit_nets.standard())


@pytest.mark.parametrize("predict", ["worst_of", "votes"])
def test_a_random_model_is_tried_by_the_rule_of_the_report(tmp_path, predict):
    report = saved(tmp_path, noisy(), predict=predict, n_eval=5)
    clean, worst = report.row("clean"), report.row("worst")
    kept = set(report.witnesses.numbers.tolist())
    assert set((~worst.robust & (worst.wrong > clean.wrong)).nonzero()[0]) <= kept <= set((~worst.robust).nonzero()[0])
    checked = check_witnesses(tmp_path, noisy())
    assert checked.draws == (5 if predict == "worst_of" else 1)
    assert checked.falls.tolist() == (checked.wrong > 0).tolist() and checked.falls.mean() > 0.8
    if predict == "worst_of":
        assert 0 < checked.wrong.sum() <= 5 * len(checked.falls) and "fresh draws" in checked.to_text()


def test_kept_rows_have_their_witnesses(tmp_path):
    once = saved(tmp_path / "a", out=tmp_path / "out")
    again = saved(tmp_path / "b", out=tmp_path / "out")
    assert once.witnesses.summary() == again.witnesses.summary()


def test_the_command_line_keeps_and_checks(tmp_path, capsys, short_signs):
    out = str(tmp_path / "out")
    few = ["--images", "20", "--protocol", "fast", "--device", "cpu"]
    assert cli.main(["evaluate", "zoo:digits-standard", *few, "--keep", "all", "--out", out]) == 0
    capsys.readouterr()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation").symlink_to(out)
    assert cli.main(["check", str(tmp_path / "run"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path), "--device", "cpu"]) == 2
    assert f"{tmp_path} contains no report.json" in capsys.readouterr().err
    strangers = tmp_path / "out" / "run.yaml"
    before = strangers.read_text()
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    model = next(line for line in before.splitlines() if "zoo:digits-standard" in line)
    code = f"{tmp_path}/evil.py:make"
    for line in (model.replace("zoo:digits-standard", code), f"{model}\nclassifier: {code}"):
        strangers.write_text(before.replace("classifier: null\n", "").replace(model, line))
        assert cli.main(["check", out, "--device", "cpu"]) == 2
        assert "MODEL must be named" in capsys.readouterr().err
    strangers.write_text(before)
    assert cli.main(["check", out, "--device", "cpu"]) == 0
    assert "still fall" in capsys.readouterr().out
    assert cli.main(["check", out, "zoo:digits-pgd-at", "--device", "cpu"]) == 1
    assert "no longer falls" in capsys.readouterr().out
