"""The HTML page of a report says what its JSON says and needs no network; a report is understood from itself."""

import html
import json
import re

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import row
from small_models import labelled

from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.evaluation import Report
from purify_fast.judge.alarms.signs import Finding
from purify_fast.judge.results.rows import Examples
from purify_fast.judge.show.text import html_page, in_colors, picture_lines


@pytest.fixture
def report():
    rows = [row("clean", [1, 1, 1, 1], kind="clean"), row("PGD <b>", [1, 0, 0, 1]), row("APGD", [1, 1, 0, 0])]
    rows += [row("masked", [1, 1, 1, 1], reliable=False), row("worst", [1, 0, 0, 0], kind="worst")]
    report = Report(rows, ["a note with <script>"], {"threat": "L-inf 8/255", "version": "purify_fast 0"})
    report.findings = [Finding("unreliable", "9 of 10 images", "Square", alarm="missed images", model="m")]
    report.curves = {"steps": [[1, 0.9], [10, 0.5], [30, 0.4]]}
    return report


def assert_is(page, report):
    """The lines of the page's table, with the accuracies that they carry, are those of the JSON."""
    lines = re.findall(r'<tr [^>]*data-accuracy="([^"]*)"[^>]*><td>([^<]*)</td>', page)
    wanted = json.loads(report.to_json())["rows"]
    assert [(html.unescape(attack), float(share)) for share, attack in lines] == [
        (row["attack"], row["accuracy"]) for row in wanted
    ]


def test_the_table_is_the_jsons_texts_are_escaped_and_nothing_is_loaded(report):
    report.row("worst").reliable = False
    report.rows[2].settings["survivors_only"] = True
    page = html_page(report)
    assert_is(page, report)
    assert 'class="card bad"' in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "PGD &lt;b&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "@import" not in page and "url(http" not in page


def test_the_number_comes_first_and_what_all_rows_share_is_said_once(report):
    page = html_page(report)
    assert page.index('class="number"') < page.index("<dl>") < page.index("data-accuracy")
    columns = re.search(r"<thead><tr>(.*?)</tr>", page[page.rindex('<div class="scroll">') :])[1]
    assert columns == "<th>attack</th><th>accuracy</th><th>remark</th>", columns
    assert "The same in all rows: n 4, draws 1, gradients 0 % / 0 % / 0 %, seed 3, s 1.5." in page
    assert page.count('<span class="pill unreliable">') == 2


def test_differences_are_red_where_values_grew_and_blue_where_they_fell():
    change = torch.tensor([[0.2, -0.1], [0.0, -0.2]])[None, None]
    red, green, blue = in_colors(change)[0]
    assert torch.allclose(red, torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert torch.allclose(blue, torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert torch.allclose(green, torch.tensor([[0.0, 0.5], [1.0, 0.0]]))


def test_a_curve_has_every_point(report):
    report.curves = {"steps of PGD": [[1, 0.9], [10, 0.5], [100, 0.4]], "one": [[1, 0.9]]}
    page = html_page(report)
    # equal factors stand at equal distances
    assert re.findall(r'<circle class="point" cx="([\d.]+)"', page) == ["50.0", "295.0", "540.0"]
    assert "Accuracy against steps of PGD" in page and "Accuracy against one" not in page
    # a line is where the report's number is, of 204 units for 100 %
    (height,) = re.findall(r'<line class="headline" x1="50" y1="([\d.]+)"', page)
    assert float(height) == pytest.approx(216 - 204 * report.headline.accuracy)


@pytest.mark.parametrize("survivors", [False, True])
def test_pictures_are_of_the_attack_that_felled_most(survivors):
    """Pictures of an attack on survivors would show images that fell to nothing."""

    def picture(value):
        images = np.full((2, 1, 4, 4), value, dtype=np.float32)
        return Examples(images, images, np.array([0, 1]), np.ones(2, dtype=bool), np.array([1, 0]))

    first = row("first", [0, 0, 1, 1] if survivors else [1, 1, 0, 1], examples=picture(0.2))
    last = row("last", [0, 0, 0, 1], examples=picture(0.6))
    last.settings["survivors_only"] = survivors
    rows = [row("clean", [1, 1, 1, 1], kind="clean"), first, last]
    page = html_page(Report(rows), lambda x: x.flatten(1)[:, :2])
    assert f"Attacked images: {'first' if survivors else 'last'}" in page and page.count("data:image/png") == 6


QUIET = {"eps": 0.2, "attacks": [PGD(steps=5)]}


def test_the_pictures_are_of_images_that_fell(tmp_path):
    model, (x, y) = zoo.load("digits-pgd-at"), zoo_digits(24)
    report = evaluate(model, x, y, **QUIET, out=tmp_path)
    attacked = report.row("PGD-5 ce")
    right = report.row("clean").robust
    fell = right & ~attacked.robust
    assert 0 < fell.sum() < right.sum() and not fell[:8].all()
    for one in (attacked.examples, evaluate(model, x, y, **QUIET, out=tmp_path).row("PGD-5 ce").examples):
        assert np.array_equal(one.labels, y.numpy()[fell][:8]) and one.fell.all()
        said = model(torch.from_numpy(one.adversarial)).argmax(1).numpy()
        assert np.array_equal(one.predicted, said) and (one.predicted != one.labels).all()
    # without the model the class after the attack is known all the same
    for given in (model, None):
        assert picture_lines(attacked.examples, given)[0][1][1] == f"attacked, predicted {one.predicted[0]}"


SHORT = {"eps": 8 / 255, "attacks": [PGD(steps=2)]}


def broken(below):
    """A model whose logits are NaN for bright images."""

    def model(x):
        level = x.mean((1, 2, 3))[:, None]
        return torch.where(level < below, level * torch.tensor([1.0, 0.0, 0.0]), torch.nan)

    return model


def test_nan_is_no_prediction():
    """``argmax`` of NaN is class 0: such a model was 100 % robust on images of class 0."""
    x, y = torch.linspace(0.1, 0.9, 10).view(10, 1, 1, 1).expand(10, 1, 4, 4).contiguous(), torch.zeros(10).long()
    report = evaluate(broken(-1), x, y, name="m", **SHORT)
    clean = report.row("clean")
    assert clean.accuracy == 0 == report.headline.accuracy and clean.nonfinite_predictions == 10
    assert json.loads(report.to_json())["rows"][0]["nonfinite_predictions"] == 10
    half = evaluate(broken(0.5), x, y, **SHORT).row("clean")
    assert (half.accuracy, half.nonfinite_predictions) == (0.5, 5)
    for logits, decided in (([torch.inf] * 3, 0), ([-torch.inf] * 3, 0), ([torch.inf, 0.0, 1.0], 10), ([0.0] * 3, 10)):
        row = evaluate(lambda x, logits=logits: torch.tensor(logits).expand(len(x), 3), x, y, **SHORT).row("clean")
        assert row.robust.sum() == decided == 10 - row.nonfinite_predictions


def test_nothing_to_attack_is_not_unreliable():
    model, x, y = labelled(6)
    report = evaluate(model, x, (y + 1) % 10, **SHORT)
    assert report.row("worst").accuracy == 0 and report.row("worst").attacked == 0
    latex = report.to_latex().splitlines()
    assert latex[0].startswith(r"\begin{tabular}") and len(latex) == len(report.rows) + 6
    assert all(row.in_percent in line for row, line in zip(report.rows, latex[4:-2], strict=True))
    for text in (report.to_text(), report.to_markdown().split("\nn: images")[0]):
        assert "nothing to attack" in text and "unreliable" not in text
    assert "nothing to attack" not in evaluate(model, x, y, **SHORT).to_text()
