"""The images that fell are saved with a report, exactly, and anybody can give them to a model again."""

import json

import digit_nets
import numpy as np
import pytest
import torch
from evaluating import evaluate
from small_models import Made

from purify_fast import cli
from purify_fast.attacks import APGD, PGD
from purify_fast.defences import MajorityVote
from purify_fast.evaluation import CheckedAdversarial, Report, check_adversarial
from purify_fast.judge.show.report import FILE, Adversarial


def saved(folder, model=None, **options):
    options = {"eps": digit_nets.EPS, "attacks": [PGD(steps=5)]} | options
    model = digit_nets.standard() if model is None else model
    report = evaluate(model, *digit_nets.held_out(40), **options)
    report.save(folder)
    return report


@pytest.mark.parametrize(("norm", "eps"), [("linf", digit_nets.EPS), ("l2", 1.0), ("l1", 6.0)])
def test_every_image_that_fell_is_saved_as_the_model_saw_it(tmp_path, norm, eps):
    report = saved(tmp_path, eps=eps, norm=norm, attacks=[PGD(steps=2), APGD(steps=10)])
    fell = report.row("clean").robust & ~report.row("worst").robust
    arrays, (x, y) = np.load(tmp_path / FILE), digit_nets.held_out()
    assert fell.any() and arrays["indices"].tolist() == fell.nonzero()[0].tolist()
    images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    assert torch.equal(labels, y[arrays["indices"]]) and (digit_nets.standard()(images).argmax(1) != labels).all()
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    moved = torch.linalg.vector_norm((images - x[arrays["indices"]]).flatten(1), ord=order, dim=1)
    assert moved.min() > 0 and moved.max() <= eps * (1 + 1e-5)
    for index, attack in zip(arrays["indices"], arrays["attacks"], strict=True):
        assert not report.row(str(attack)).robust[index]
    # the rows keep a few images for the page, and none of the others
    assert all(row.fallen is None and row.fallen_images is None for row in report.rows)


def test_another_model_does_not_fit(tmp_path):
    report = saved(tmp_path)
    same = check_adversarial(tmp_path, digit_nets.standard())
    assert same.fits and same.fooled.all() and len(same.fooled) == len(report.adversarial) > 0
    other = check_adversarial(tmp_path, digit_nets.robust())
    first = report.adversarial.indices[(~other.fooled).nonzero()[0][0]]
    assert not other.fits and f"classified correctly: image {first} (PGD-5 ce" in other.to_text()


def refused(folder, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_adversarial(folder, digit_nets.standard())


def test_changed_damaged_and_missing_files_are_refused(tmp_path):
    assert len(saved(tmp_path, eps=1e-6).adversarial) == 0
    refused(tmp_path, "no attack fooled the model, so nothing can be checked")
    saved(tmp_path)
    path = tmp_path / FILE
    content, arrays = path.read_bytes(), dict(np.load(path))
    for name, change in (("images", 0.5), ("labels", 1), ("indices", 1)):
        np.savez(path, **arrays | {name: arrays[name] + arrays[name].dtype.type(change)})
        refused(tmp_path, "has changed since the report was saved")
    np.savez(path, **arrays | {"attacks": arrays["attacks"][::-1].astype("U40") + arrays["attacks"].astype("U40")})
    refused(tmp_path, "has changed")
    for damaged in (content[: len(content) // 2], b"", b"mine"):
        path.write_bytes(damaged)
        refused(tmp_path, "is damaged, or another program wrote it")
    path.unlink()
    refused(tmp_path, FILE)
    # a report that was read knows its file, and one without images leaves the file of its folder alone
    saved(tmp_path)
    read = Report.from_json((tmp_path / "report.json").read_text())
    read.save(tmp_path)
    assert check_adversarial(tmp_path, digit_nets.standard()).fits
    Report(read.rows).save(tmp_path)
    assert path.exists()
    refused(tmp_path, "has no adversarial images")


def noisy():
    """The standard network, with noise on its logits."""
    return Made(lambda self, x: (z := self.net(x)) + 2 * torch.randn_like(z), net=digit_nets.standard())


@pytest.mark.parametrize("voted", [False, True])
def test_a_random_model_is_judged_by_the_rule_of_the_report(tmp_path, voted):
    def made():
        return MajorityVote(noisy(), 5) if voted else noisy()

    report = saved(tmp_path, made(), n_eval=1) if voted else saved(tmp_path, made(), predict="worst_of", n_eval=5)
    clean, worst = report.row("clean"), report.row("worst")
    kept = set(report.adversarial.indices.tolist())
    assert set((~worst.robust & (worst.wrong > clean.wrong)).nonzero()[0]) <= kept <= set((~worst.robust).nonzero()[0])
    checked = check_adversarial(tmp_path, made())
    assert checked.fits and checked.fooled.mean() > 0.7
    other = check_adversarial(tmp_path, MajorityVote(digit_nets.robust(), 5) if voted else digit_nets.robust())
    assert not other.fits and not other.same_weights and "whose model had other weights" in other.to_text()
    if voted:
        with pytest.raises(ValueError, match="must be judged by the majority vote of 5 draws, as in the report"):
            check_adversarial(tmp_path, noisy())
    # the draws of a check are those of the report if the seed is
    again = check_adversarial(tmp_path, made(), seed=0)
    assert again.wrong == report.adversarial.about["wrong"]
    words = f": {100 * np.mean(again.wrong) / len(kept):.1f} % of its single predictions are wrong, in the report"
    assert words in again.to_text()


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_the_same_random_model_is_refused_once_in_a_hundred_checks(shared):
    """Each image of its own, or with a part of the draw that all images share."""
    generator, images = np.random.default_rng(0), np.zeros((40, 1, 1, 1), dtype=np.float32)

    def fits(share=1.0):
        draws = generator.normal(size=(20, 40)) + 5 * shared * generator.normal(size=(20, 1)) > 0
        old, new = draws.sum(1).reshape(2, 10)
        about = {"random": True, "n_eval": 5, "wrong": old.tolist()}
        adversarial = Adversarial(images, *[images] * 3, about)
        return CheckedAdversarial(adversarial, images > 0, (share * new).astype(int).tolist()).fits

    assert np.mean([fits() for _ in range(400)]) >= 0.98 and (shared or not any(fits(0.5) for _ in range(20)))


def test_a_random_model_is_not_checked_without_draws_of_the_report(tmp_path):
    saved(tmp_path, noisy())
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    del content["adversarial"]["about"]["wrong"]
    path.write_text(json.dumps(content))
    refused(tmp_path, "an earlier version wrote .*, without draws to compare: evaluate again")


def test_cached_rows_have_their_images(tmp_path, made_rows):
    once = saved(tmp_path / "a", out=tmp_path / "out")
    made = len(made_rows)
    again = saved(tmp_path / "b", out=tmp_path / "out")
    assert once.adversarial.facts() == again.adversarial.facts() and len(made_rows) == made


def test_the_command_line_checks(tmp_path, capsys, short_signs):
    out = str(tmp_path / "out")
    few = ["--images", "20", "--protocol", "fast", "--device", "cpu"]
    assert cli.main(["evaluate", "zoo:digits-standard", *few, "--out", out]) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation").symlink_to(out)
    model = "zoo:digits-standard"
    for words, code, message in (
        ([str(tmp_path / "run"), model], 0, "still fool the model, which fits"),
        ([out, "zoo:digits-pgd-at"], 1, "which does not fit"),
        ([str(tmp_path), model], 2, f"{tmp_path} contains no report.json"),
        # The model and the options are those of run.yaml.
        ([out], 0, "still fool the model, which fits"),
        ([], 2, "REPORT must be given"),
    ):
        assert cli.main(["check", *words, "--device", "cpu"]) == code and message in "".join(capsys.readouterr())
