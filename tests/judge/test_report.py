import html
import json
import math
import os
import platform
import re

import numpy as np
import pytest
import torch
from digit_nets import zoo_digits
from evaluating import evaluate
from reports import MASKED, drawn, forms, row
from small_models import labelled

from purify_fast import frozen_copy, zoo
from purify_fast._settings import digest
from purify_fast.attacks import PGD
from purify_fast.defences import WithAggregation
from purify_fast.evaluation import EvaluateConfig, Examples, Report
from purify_fast.judge.alarms.signs import Finding
from purify_fast.judge.request.deadline import precision_name
from purify_fast.judge.request.preparation import changes
from purify_fast.judge.show.text import html_page, in_colors, notes_on_rows, picture_lines
from purify_fast.speed.precision import float32_products


def test_headline_is_the_lowest_success_counts():
    clean = row("clean", robust=[0, 0, 0, 0], kind="clean")
    high, low = row("high"), row("low", robust=[1, 0, 0, 0])
    assert Report([clean, high, low]).headline is low
    unreliable = row("lower still", robust=[0, 0, 0, 0], health=MASKED)
    assert Report([high, low, unreliable]).headline is unreliable
    tie = row("tie", robust=[0, 1, 0, 0], health=MASKED)
    assert Report([tie, low]).headline is low and Report([low, tie]).headline is low
    with pytest.raises(ValueError, match="needs an attack on the model, got none"):
        _ = Report([clean]).headline


def test_json_round_trip():
    report = Report([row(settings={"steps": 3, "eps": 0.1}), row("x", health=None)], ["a note"])
    text = report.to_json()
    back = Report.from_json(text)
    assert back.to_json() == text and back.notes == ["a note"]
    assert back.rows[0].robust.dtype == bool and back.rows[0].robust.tolist() == [True, False, True, True]
    assert back.rows[0].settings == {"steps": 3, "eps": 0.1} and back.rows[1].health is None
    small = row(health={"gradients": 10000, "nonfinite": 1, "zero": 30, "images": 0, "unmoved": 0})
    assert small.describe_health() == "0.01 % / 0.3 % / -"
    assert small.health_in_words() == "0.01 % of the gradients are not finite, 0.3 % are zero"
    assert back.rows[1].health_in_words() == "the gradients were not counted"
    with pytest.raises(ValueError, match="got 99"):
        Report.from_json(text.replace('"format": 3', '"format": 99'))


@pytest.mark.parametrize("change", [{"variant": "deterministic"}, {"variant": "fixed"}, {"kind": "authors"}])
def test_a_row_of_an_earlier_version_on_another_model_is_not_taken_for_one_on_the_model(change):
    content = json.loads(Report([row("A"), row("B")]).to_json())
    content["rows"][0]["variant"] = "random"
    assert len(Report.from_json(json.dumps(content)).rows) == 2
    content["rows"][1] |= change
    with pytest.raises(ValueError, match="the row 'B' judged another model than the deployed one: evaluate again"):
        Report.from_json(json.dumps(content))


def test_numbers_in_the_tables():
    report = Report([row(robust=[1, 1, 1, 1]), row("masked", health=MASKED)], ["note"])
    text = report.to_markdown()
    assert "| m | PGD | - | 4 | 100.0 (39.8 to 100.0) | 100.0 | 1 | 0 % / 0 % / 0 % |  | 3 | 1.5 |" in text
    assert "0 % / 99 % / 0 %" in text and text.count("- note") == 1 and "unreliable" in text
    assert "**m: 75.0 (19.4 to 99.4) %** of 4 images are still classified correctly" in text
    assert re.search(r"masked +4 +75.0 \(19.4 to 99.4\) .* unreliable", report.to_text())


def test_no_number_of_few_images_is_shown_as_certain():
    """All of 40 images are right: the true accuracy may be 91.2 %. No interval is too narrow."""
    one = row(robust=[1] * 40)
    assert one.in_percent == "100.0 (91.2 to 100.0)" and row(robust=[0] * 40).in_percent == "0.0 (0.0 to 8.8)"
    assert one.interval == pytest.approx((0.025 ** (1 / 40), 1)) and one.standard_error == 0
    assert not any("±" in text.partition("one draw:")[0] for text in forms(Report([one])))
    assert 'style="left:91.19%;width:8.81%"' in Report([one]).to_html()
    (note,) = notes_on_rows([one], one)
    assert "40 images, the 95 % interval of this accuracy is 9 points wide" in note and "by 6 points" in note
    several = drawn("A", [5] * 40, [0] * 40)
    assert several.in_percent == "100.0 (91.2 to 100.0)" and several.mean_interval == several.interval
    # draws that images share are a single sample of the event that all of them are right
    shared = row(right=np.repeat([[True], [True], [False], [True], [False]], 40, 1))
    assert shared.images_share_draws and shared.interval is None and shared.in_percent == "0.0"
    (read,) = Report.from_json(Report([shared]).to_json()).rows
    assert math.isnan(shared.standard_error) and np.array_equal(read.right, shared.right)


def test_a_published_gain_and_its_error():
    """14.45 points = 59.18 - 44.73."""
    with_it, without = row(robust=[1] * 303 + [0] * 209), row(robust=[1] * 229 + [0] * 283)
    gain = Report([with_it]).paired(Report([without]), "PGD")
    assert f"{100 * gain.difference:.2f}" == "14.45" and gain.n == 512
    # 74 images differ, all to one side: sqrt(p (1 - p) / (n - 1)), p = 74 / 512
    assert f"{100 * gain.standard_error:.2f}" == "1.56"


def test_rows_of_several_models_are_no_report():
    """The lowest number of two models would stand for both; earlier versions wrote reports on several models."""
    both = Report([row(model="a"), row(model="b", robust=[0, 0, 0, 0])])
    content = json.loads(Report([row(model="a")]).to_json())
    content["rows"].append(row(model="b").to_dict())
    asked = (Report.to_json, Report.to_text, Report.to_markdown, Report.to_html, lambda each: each.headline)
    for ask in (*asked, lambda each: Report.from_json(json.dumps(content))):
        with pytest.raises(ValueError, match="must have the rows of one model, got those of a, b"):
            ask(both)
    assert Report([row(model="a")]).model == "a" and Report().model == ""


class Purifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2 * 36, 4)

    def purify(self, x):
        return (x[:, None] + 0.1 * torch.randn(len(x), 5, *x.shape[1:])).clamp(0, 1)

    def sample_logits(self, x):
        return self.head(self.purify(x).flatten(2)[:, :, :72])

    def forward(self, x):
        return self.sample_logits(x).mean(1)


def test_a_report_is_saved_with_its_page(tmp_path):
    model = Purifier()
    x, y = torch.rand(6, 3, 6, 6), torch.randint(0, 4, (6,))
    report = evaluate(model, x, y, eps=0.1, steps=2, attacks=[PGD()], n_eval=2, name="m 1")
    report.rows[1].examples = Examples(x.numpy(), x.numpy(), y.numpy(), np.ones(6, dtype=bool), 1 - y.numpy())
    rng = torch.get_rng_state()
    report.save(tmp_path / "run", model)
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert set(os.listdir(tmp_path / "run")) == {"adversarial.npz", "report.html", "report.json", "report.md"}
    assert Report.from_json((tmp_path / "run/report.json").read_text()).to_json() == report.to_json()
    # five reconstructions, of which four are shown, or none, beside three columns
    for defence, columns in ((model, 7), (None, 3)):
        assert report.to_html(defence).count("<img ") == 6 * columns
    # of two channels there is no picture
    arrays = [part for part in vars(report.rows[1].examples).values() if part is not None]
    two = Examples(*(part[:, :2] if part.ndim > 1 else part for part in arrays))
    assert "<img " not in Report([row(examples=two)]).to_html()


def about(threat="L-inf 8/255", **more):
    return {"threat": threat, "seed": "0", **more}


def of_model(name, threat=None, **more):
    """A report on a model, within a threat model if one is given, with a clean row and one of another threat model."""
    rows = [row(model=name, **more), row("clean", kind="clean"), row("weak", threat="L2 0.5")]
    return Report(rows, about={} if threat is None else about(threat))


def test_rows_are_paired_on_the_same_images_within_the_same_threat_model():
    """Half of the images at twice the radius says nothing about which model is better."""
    near, far = of_model("a", "L-inf 0.05"), of_model("b", "L-inf 0.15", robust=[1, 0, 0, 0])
    # the same threat model, and a report that does not say what it is about
    for other in (of_model("b", "L-inf 0.05", robust=[1, 0, 0, 0]), of_model("b", robust=[1, 0, 0, 0])):
        assert str(near.paired(other, "PGD")) == "+50.0 ± 28.9 points (n = 4, paired)"
    # clean images, and rows that are within the same other threat model
    assert near.paired(far, "clean").difference == near.paired(far, "weak").difference == 0
    for refused, message in (
        (lambda: near.paired(far, "PGD"), "same threat model, got L-inf 0.05 and L-inf 0.15"),
        (lambda: near.paired(near, "PGD", "weak"), "same threat model, got L-inf 0.05 and L2 0.5"),
        (lambda: near.paired(of_model("b", data="e", robust=[1, 0]), "PGD"), "same images"),
        (lambda: near.paired(near, "no such row"), "PGD"),
        (lambda: Report([row(), row()]).row("PGD"), "PGD"),
    ):
        with pytest.raises((KeyError, ValueError), match=message):
            refused()


def test_a_report_says_what_repeats_it(tmp_path, monkeypatch):
    """Versions, command, model, processor, images, seed, date and a changed protocol are in all forms."""
    monkeypatch.setattr("sys.argv", ["judge.py", "--fast"])
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "judge.py", "--fast"])
    torch.manual_seed(0)
    model, x = Purifier(), torch.rand(6, 3, 6, 6)
    y = model(x).argmax(1)
    options = {"eps": 0.1, "protocol": "fast", "n_eval": 2, "seed": 7, "dataset_name": "noise", "probes": False}
    report = evaluate(model, x, y, **options, steps=2)
    report.save(tmp_path, model)
    date = report.about["date"]
    report.save(tmp_path, model)
    assert report.about["date"] == date
    # The name of the protocol itself is unchanged, because programs compare it.
    assert report.about["protocol"] == "fast" and report.about["changed"] == "steps 2, probes False"
    told = [f"PyTorch {torch.__version__}, Python {platform.python_version()}", f"6 of noise, hash {digest(x, y)[:12]}"]
    told += ["python judge.py --fast", "protocol fast, changed: steps 2", "7"]
    told += [report.about[name] for name in ("processor", "model", "passes", "date")]
    for text in (*forms(report)[1:], (tmp_path / "report.md").read_text()):
        text = " ".join(html.unescape(text).split())
        assert all(words in text for words in told), text
    model.head.weight.data += 1
    # No command repeats an evaluation that was typed.
    monkeypatch.setattr("sys.argv", ["-c"])
    changed = evaluate(model, x, y, eps=0.5, attacks=[]).about
    assert changed["model"] != report.about["model"] and "command" not in changed


def test_only_what_changes_the_attacks_changes_a_protocol():
    assert changes(EvaluateConfig("fast", eot_iter=3, probes=True)) == "eot_iter 3"
    others = {"n_eval": 2, "seed": 3, "batch_size": 7, "claim": 4, "predict": "worst_of"}
    assert not changes(EvaluateConfig("fast", **others)) and changes(EvaluateConfig("fast", probes=False))


def test_the_precision_of_a_model_is_told():
    """It is told of a copy in bfloat16 on every device, of rounded float32 only where a device rounds it."""
    cpu, gpu, model = torch.device("cpu"), torch.device("cuda"), zoo.load("digits-carso-objective")
    x, y = torch.rand(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64)
    with float32_products():
        assert precision_name(model, gpu) is precision_name(frozen_copy(model, x, dtype=torch.float32), gpu) is None
    with float32_products(tf32=True):
        assert [precision_name(model, device) for device in (cpu, gpu)] == [None, "tf32"]
    fast = frozen_copy(model, x, dtype=torch.bfloat16)
    assert precision_name(WithAggregation(fast, "lse"), cpu) == "bfloat16"
    assert evaluate(fast, x, y, eps=0.1, attacks=[]).about["precision"] == "bfloat16"
    assert "precision" not in evaluate(model, x, y, eps=0.1, attacks=[]).about


# -- the page ----------------------------------------------------------------------------------------------------------
# The HTML page of a report says what its JSON says and needs no network; a report is understood from itself.


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
    red, green, blue = in_colors(torch.tensor([[0.2, -0.1], [0.0, -0.2]])[None, None])[0]
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
