"""A report is understood from itself: its words, the meaning of its columns, its verdict and its pictures."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluating import evaluate
from reports import drawn, forms, row
from torch import nn

import purify_fast
from purify_fast import __version__
from purify_fast.attacks import BPDA, PGD, AutoAttack
from purify_fast.evaluation import AttackSpec, Examples, Report, Row, lee_kim_2023, merge
from purify_fast.evaluation.alarms import Finding
from purify_fast.evaluation.results.rows import worst_rows
from purify_fast.evaluation.show.page import html_page, picture_lines

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"eps": 0.2, "progress": False, "attacks": [PGD(steps=5)]}


@pytest.fixture(scope="module")
def digits():
    images = purify_fast.load_dataset("digits")
    return purify_fast.zoo.load("digits-pgd-at"), images.x_test[:24].float() / 255, images.y_test[:24]


def joined(text):
    return " ".join(text.split())


# -- words --------------------------------------------------------------------------------------------------------


def test_a_deterministic_model_is_not_called_random(digits, tmp_path):
    model, x, y = digits
    report = evaluate(model, x, y, **QUIET, out=tmp_path)
    # kept rows too, by a version that did not yet say so
    kept = evaluate(model, x, y, **QUIET, out=tmp_path)
    for found in (report, kept, Report.from_json(report.to_json())):
        assert [row.describe_variant() for row in found.rows] == ["deterministic"] * 3
    for text in forms(report)[1:]:
        assert "deterministic" in text and "| random |" not in text and "<td>random</td>" not in text
    assert "random" not in joined(report.to_text()).replace("random start", "")
    # the settings of every row are written out on the page
    assert "variant <code>deterministic</code>" in forms(report)[2]
    assert "<code>random</code>" not in forms(report)[2]


def test_the_terminal_says_where_more_is_and_that_rows_of_a_random_model_differ_by_chance(tmp_path):
    report = Report([row("clean", kind="clean"), row("PGD")])
    assert "; more: report.save(FOLDER) writes report.md" in joined(report.to_text())
    report.save(tmp_path)
    assert "; more: the saved report.md" in joined(report.to_text())
    assert "chance" not in report.to_text()
    report = Report([drawn("clean", [5], [0], kind="clean"), drawn("PGD", [5], [0])])
    assert "rows differ by chance, and a later row may be higher;" in joined(report.to_text())


def test_a_random_model_is_called_so_and_its_modes_are_named():
    model = purify_fast.zoo.load("digits-carso-objective").eval()
    images = purify_fast.load_dataset("digits")
    attacks = [AttackSpec(PGD(steps=1), variant=variant) for variant in ("random", "fixed", "deterministic")]
    settings = QUIET | {"attacks": attacks, "eot_iter": 1, "n_eval": 2}
    report = evaluate(model, images.x_test[:4], images.y_test[:4], **settings)
    words = {row.variant: row.describe_variant() for row in report.rows}
    assert words == {"random": "random", "fixed": "fixed noise", "deterministic": "noise off"}


def test_a_number_of_images_that_there_are_not_is_in_no_name(digits):
    pytest.importorskip("pyautoattack")
    model, x, y = digits
    few = AutoAttack(steps=2, n_queries=2)
    attacks = [AttackSpec(few, max_images=100), AttackSpec(PGD(steps=2), max_images=4)]
    report = evaluate(model, x[:8], y[:8], **QUIET | {"attacks": attacks})
    assert "AutoAttack standard, 2 steps, 2 queries" in report.attacks and "PGD-2 ce, first 4" in report.attacks
    # twice the same attack on all images is one
    twice = [AttackSpec(PGD(steps=2), max_images=most) for most in (8, 100)]
    assert evaluate(model, x[:8], y[:8], **QUIET | {"attacks": twice}).attacks == ["clean", "PGD-2 ce", "worst"]


# -- columns ------------------------------------------------------------------------------------------------------


def test_every_column_is_explained_on_the_page():
    survivors = row(attack="second", settings={"survivors_only": True}, attacked=3)
    report = Report([row("clean", kind="clean"), row(), survivors, row("worst", kind="worst")])
    assert all("4 (3)" in text for text in forms(report))
    for text in forms(report)[1:]:
        text = " ".join(text.split())
        for meaning in ("n: images;", "accuracy: %", "one draw: %", "draws: how", "EOT: draws", "The row worst counts"):
            assert meaning in text
    for text in forms(Report([row("clean", kind="clean")])):
        assert "The row worst" not in text


def test_a_terminal_shows_what_differs_in_100_columns():
    """Long names are wrapped, columns that say the same of every row are left to the saved report."""
    name = "APGD-100 margin_targeted towards 9 classes from 2 starts, tried on the deployed defence"
    rows = [
        row("clean", kind="clean"),
        row(name, nonfinite_predictions=1234, reliable=False),
        row(attack="worst", kind="worst"),
    ]
    text = Report(rows, ["a note " * 40]).to_text(color=False)
    head = text.splitlines()[0].split()
    assert max(map(len, text.splitlines())) <= 100 and head == ["attack", "images", "accuracy", "gradients"]
    cells = [line[: text.index("  images")].strip() for line in text.splitlines()]
    assert name in " ".join(cells) and "1234 predictions" in text
    assert len([line for line in text.splitlines() if line.startswith("accuracy: ")]) == 1
    many = [row(name, model=f"a model of a long name, number {i}", reliable=False) for i in range(5)]
    assert max(map(len, Report(many).to_text(color=False).splitlines())) <= 100
    drawn = [row("clean", kind="clean", n_eval=5), row(n_eval=5), row("PGD, fixed", variant="fixed")]
    heads = Report(drawn).to_text().splitlines()[0].split()
    assert heads == ["attack", "variant", "images", "accuracy", "one", "draw", "gradients"]


def test_the_columns_are_what_is_said_of_them():
    """Three predictions each: mean counts single ones, accuracy the images that are right in all."""

    class Flips(nn.Module):
        def forward(self, x):
            sure = x.flatten(1)[:, :2]
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.5, torch.randn(len(x), 2), sure)

    x, y = torch.full((60, 1, 2, 2), 0.25), torch.zeros(60).long()
    x[:, :, 0, 0] += 0.2  # class 0
    x[:30] = 0.75  # guessed anew each time
    clean = evaluate(Flips(), x, y, eps=0.01, attacks=[], n_eval=3).row("clean")
    assert clean.n_eval == 3 and 0.5 <= clean.accuracy < clean.mean < 1
    assert abs(clean.mean - 0.75) < 0.12 and abs(clean.accuracy - (0.5 + 0.5 / 8)) < 0.12


def test_bad_luck_of_several_attacks_does_not_add_up():
    """Each attack leaves every image right in four of five draws, or in all, by luck: so does the row worst."""
    lucky = np.arange(12) % 2
    same = [2] * 12
    rows = [drawn("clean", 4 + lucky, same, kind="clean")]
    rows += [drawn("a", 4 + lucky, same, attacked=12), drawn("b", 5 - lucky, same, attacked=12)]
    rows += worst_rows(rows)
    assert rows[-1].accuracy == 0.5 and rows[-1].mean == 0.9
    for text in forms(Report(rows))[1:]:
        cells = next(line for line in text.splitlines() if re.search(r"\bworst\b.*\b50\.0 ± 14\.4\b", line))
        shown = re.sub(r"</?t[dr][^>]*>|\|", "  ", cells)
        assert re.search(r"50\.0 ± 14\.4\s+90\.0 ± 2\.9\s+5\s", shown), cells


def test_the_attack_of_lee_and_kim_says_how_often_it_is_judged():
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2).long()

    def noisy(x):
        return torch.randn(len(x), 2) / 10 + torch.tensor([1.0, 0.0])

    spec = lee_kim_2023(0.01)
    attacks = [replace(spec, attack=replace(spec.attack, steps=1, eot_iter=1))]
    for n in (2, 5):
        for text in forms(evaluate(noisy, x, y, eps=0.01, attacks=attacks, n_eval=n, progress=False))[1:]:
            assert f"an image counts only if all of its predictions after the attack are right, here {n} of {n}" in (
                " ".join(text.split())
            )
    plain = evaluate(noisy, x, y, eps=0.01, attacks=[PGD(steps=1)], progress=False)
    assert "Lee & Kim" not in plain.to_text()


# -- the verdict --------------------------------------------------------------------------------------------------


def test_the_verdict_follows_from_the_number_and_from_the_signs(digits):
    model, x, y = digits
    honest = evaluate(model, x, y, **QUIET, name="good").to_text(color=False)
    unsuspicious = (
        "4 of 8 signs of a failed attack were asked, and none of these gives a reason to doubt the number. Not"
    )
    assert "of 24 images are still classified correctly after the attack within L-inf 0.2; without" in honest
    assert f"%. {unsuspicious}" in joined(honest)
    torch.manual_seed(0)
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    guessing = evaluate(untrained, x, y, **QUIET | {"eps": 1e-4}, name="raw").to_text(color=False)
    assert "\nthis number says little:\n- better than guessing: " in guessing
    assert (
        "is the model trained" in " ".join(guessing.split())
        and "speaks against" not in guessing
        and "no alarm" not in guessing
    )


@pytest.mark.parametrize(
    ("verdicts", "reliable", "said"),
    [
        ((), True, "of 4 images are still classified correctly under PGD."),
        (("not asked",), True, "of 4 images are still classified correctly under PGD."),
        (
            ("passed", "not asked"),
            True,
            "under PGD.\n1 of 5 signs of a failed attack were asked, and none of these gives a reason to doubt the",
        ),
        (("passed", "noted"), True, "to doubt the number. Noted: a1. Not asked: batch size"),
        (("unreliable",), False, "unreliable: a better attack may leave less:\n- a0: found (row)"),
    ],
)
def test_verdicts(verdicts, reliable, said):
    findings = [Finding(f"a{i}", verdict, "found", "row", "m") for i, verdict in enumerate(verdicts)]
    text = Report([row(reliable=reliable)], findings=findings).to_text(color=False)
    assert joined(said) in joined(text)


def test_a_short_list_of_attacks_says_what_was_not_asked(digits):
    """BPDA alone finds much, and nobody has asked whether something stopped it."""
    model, x, y = digits

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = model

        def purify(self, x):
            return (x * 7).round() / 7

        def forward(self, x):
            return self.classifier(self.purify(x))

    report = evaluate(Rounds(), x, y, **QUIET | {"attacks": [BPDA(steps=3)]})
    for text in forms(report)[1:]:
        assert "attack along the gradients of BPDA had" in joined(text)
    for text in forms(report):
        text = joined(text)
        assert "Not asked: missed images, batch size, noise and seeds" in text
        assert "Some signs need more questions; in Python, EvaluateConfig(probes=True) asks them." in text
    assert "Several signs of a failed attack were not asked." in joined(forms(report)[2]).split("</section>")[0]
    asked = evaluate(Rounds(), x, y, **QUIET | {"attacks": [BPDA(steps=3)], "probes": True})
    assert not any("which probes=True adds" in text for text in forms(asked))


# -- pictures -----------------------------------------------------------------------------------------------------


def test_the_pictures_are_of_images_that_fell(digits, tmp_path):
    model, x, y = digits
    report = evaluate(model, x, y, **QUIET, out=tmp_path)
    attacked = report.row("PGD-5 ce")
    right = report.row("clean").robust
    fell = right & ~attacked.robust
    assert 0 < fell.sum() < right.sum() and not fell[:8].all()
    for one in (attacked.examples, evaluate(model, x, y, **QUIET, out=tmp_path).row("PGD-5 ce").examples):
        assert np.array_equal(one.labels, y.numpy()[fell][:8]) and one.fell.all()
        said = model(torch.from_numpy(one.adversarial)).argmax(1).numpy()
        assert np.array_equal(one.predicted, said) and (one.predicted != one.labels).all()
    lines = picture_lines(attacked.examples, model)
    assert lines[0][0][1] == f"true class {one.labels[0]}, predicted {one.labels[0]}"
    assert lines[0][1][1] == f"attacked, predicted {one.predicted[0]}" and lines[0][1][2] is False
    # without the model the class after the attack is known all the same
    assert picture_lines(attacked.examples, None)[0][1][1] == lines[0][1][1]


@pytest.mark.parametrize(
    ("fallen", "said"),
    [
        (9, "8 of the 9 images that fell to this attack."),
        (8, "All 8 images that fell to this attack."),
        (1, "The only image that fell to this attack."),
        (0, "No image fell to this attack. The 8 shown withstood it."),
    ],
)
def test_the_page_says_which_images_it_shows(fallen, said):
    x, y = torch.full((12, 1, 3, 3), 0.5), torch.zeros(12).long()
    x[:fallen] = 0.05

    def away(model, x, y):
        # changes the class of dark images
        return torch.where(x < 0.1, x + 0.1, x)

    def classify(x):
        return torch.cat([torch.ones(len(x), 1), (((x - 0.15).abs() < 0.01).float().mean((1, 2, 3)) * 2)[:, None]], 1)

    report = evaluate(classify, x, y, eps=0.1, attacks=[away], progress=False)
    assert report.row("away").robust.sum() == 12 - fallen
    page = " ".join(html_page(report, classify).split())
    assert said in page
    assert page.count(">true class 0, predicted 0<") == (min(fallen, 8) or 8)


def test_the_picture_shows_what_the_attack_was_judged_by():
    """A random model that is asked again may classify an image that fell correctly."""
    images = np.full((3, 1, 4, 4), 0.5, dtype=np.float32)
    examples = Examples(images, images, np.array([0, 1, 2]), fell=np.ones(3, bool), predicted=np.array([1, 0, -1]))
    captions = [
        [caption for _, caption, _ in line] for line in picture_lines(examples, lambda x: torch.eye(3)[: len(x)])
    ]
    assert [line[0] for line in captions] == [f"true class {c}, predicted {c}" for c in range(3)]
    told = [
        "a picture shows one prediction"
        in html_page(Report([drawn("PGD", [5] * 3, [9] * 3, n_eval=n, examples=examples)]))
        for n in (5, 1)
    ]
    assert told == [True, False]
    said = [line[1] for line in captions]
    assert said == ["attacked, predicted 1", "attacked, predicted 0", "attacked, no class predicted"]


# -- numbers that mislead, colors, titles, representations ------------------------------------------------------------


SHORT = {"eps": 8 / 255, "progress": False, "attacks": [PGD(steps=2)]}


class Broken(nn.Module):
    """Its logits are NaN for bright images."""

    def __init__(self, below: float):
        super().__init__()
        self.below = below

    def forward(self, x):
        logits = torch.zeros(len(x), 3) + x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, 0.0, 0.0])
        return torch.where(x.mean((1, 2, 3))[:, None] < self.below, logits, torch.nan)


def test_nan_is_no_prediction():
    """``argmax`` of NaN is class 0: such a model was 100 % robust on images of class 0."""
    x, y = torch.linspace(0.1, 0.9, 10).view(10, 1, 1, 1).expand(10, 1, 4, 4).contiguous(), torch.zeros(10).long()
    report = evaluate(Broken(-1), x, y, name="m", **SHORT)
    clean = report.row("clean")
    assert clean.accuracy == 0 == report.headline.accuracy and clean.nonfinite_predictions == 10
    assert "10 predictions not finite" in report.to_text() and "10 predictions not finite" in report.to_markdown()
    assert json.loads(report.to_json())["rows"][0]["nonfinite_predictions"] == 10
    half = evaluate(Broken(0.5), x, y, **SHORT).row("clean")
    assert (half.accuracy, half.nonfinite_predictions) == (0.5, 5)
    for logits, decided in (([torch.inf] * 3, 0), ([-torch.inf] * 3, 0), ([torch.inf, 0.0, 1.0], 10), ([0.0] * 3, 10)):
        row = evaluate(lambda x, logits=logits: torch.tensor(logits).expand(len(x), 3), x, y, **SHORT).row("clean")
        assert row.robust.sum() == decided == 10 - row.nonfinite_predictions


def test_nothing_to_attack_is_not_unreliable():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(6, 1, 4, 4)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    report = evaluate(model, x, wrong, **SHORT)
    assert report.row("worst").accuracy == 0 and report.row("worst").attacked == 0
    for text in (report.to_text(), report.to_markdown().split("\nn: images")[0]):
        assert "nothing to attack" in text and "unreliable" not in text and "may be lower" not in text
    right = evaluate(model, x, (wrong - 1) % 3, **SHORT)
    assert "nothing to attack" not in right.to_text()


def test_colors_are_for_terminals(monkeypatch, capsys):
    robust = np.array([True, False])
    row = Row("m", "PGD", "pgd", "random", robust, 1, 0, 0.0, "d", reliable=False)
    report = Report([row])
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" not in report.to_text()  # pytest reads what is printed: no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[31munreliable" in report.to_text()
    assert "\033" not in report.to_text(color=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in report.to_text() and "\033" in report.to_text(color=True)


def test_the_title_names_what_the_numbers_are_about():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(6, 1, 4, 4), torch.zeros(6).long()
    report = evaluate(model, x, y, dataset_name="mnist", name="a", **SHORT)
    title = report.to_markdown().split("\n")[0]
    assert title == f"# Robustness, L-inf 8/255, mnist, purify_fast {__version__}"
    assert Report.from_json(report.to_json()).about == report.about
    # the title of a merged report has only the facts that are equal in all of its reports
    other = evaluate(model, x, y, **SHORT, name="b")
    merged = merge([report, other]).to_markdown()
    assert merged.startswith(f"# Robustness, L-inf 8/255, purify_fast {__version__}\n")
    other = evaluate(model, x, y, **SHORT | {"eps": 0.5}, norm="l2")
    assert other.to_markdown().startswith(f"# Robustness, L2 0.5, purify_fast {__version__}\n")
    assert merge([]).about == {}


def test_representations_are_short():
    robust = np.arange(5000) % 2 == 0
    row = Row("m", "PGD", "pgd", "random", robust, 1, 0, 0.0, "d", settings={"over": ["a"] * 500})
    assert repr(row) == "Row('m', 'PGD', 50.0 ± 0.7 %, n = 5000)"
    assert repr(Report([row])) == "Report(1 rows of 1 models; lowest: m: 50.0 % under PGD)"
    assert repr(Report()) == "Report(0 rows of 0 models; lowest: no attack)"
