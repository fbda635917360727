import html
import os

import numpy as np
import pytest
import torch
from evaluating import evaluate
from small_models import Purifying

from purify_fast import zoo
from purify_fast.attacks import PGD
from purify_fast.defences import WithAggregation
from purify_fast.evaluation import Examples, Report, Row, merge
from purify_fast.evaluation.request.subject import precision_name
from purify_fast.speed.precision import float32_products

pytestmark = pytest.mark.usefixtures("one_thread")


def row(model="m", attack="PGD", robust=(1, 0, 1, 1), reliable=True, kind="pgd", **more):
    robust = np.array(robust, dtype=bool)
    health = {"gradients": 100, "nonfinite": 0 if reliable else 40, "zero": 0, "images": 4, "unmoved": 0}
    values = {"n_eval": 1, "seed": 3, "seconds": 1.5, "data": "d"}
    return Row(model, attack, kind, "random", robust, **values | {"health": health, "reliable": reliable} | more)


def test_headline_is_the_lowest_success_counts():
    clean = row(attack="clean", robust=[0, 0, 0, 0], kind="clean")
    high, low = row(attack="high"), row(attack="low", robust=[1, 0, 0, 0])
    assert Report([clean, high, low]).headline is low
    unreliable = row(attack="lower still", robust=[0, 0, 0, 0], reliable=False)
    assert Report([high, low, unreliable]).headline is unreliable
    tie = row(attack="tie", robust=[0, 1, 0, 0], reliable=False)
    assert Report([tie, low]).headline is low and Report([low, tie]).headline is low
    with pytest.raises(ValueError, match="needs attacks on one deployed model, got none"):
        _ = Report([clean]).headline


def test_other_threat_models_have_headlines_of_their_own():
    mine, lower = row(attack="mine"), row(attack="lower", robust=[0, 0, 0, 0], threat="L2 0.5")
    low = row(attack="low", robust=[1, 0, 0, 0], threat="L2 0.5", reliable=False)
    worst = row(attack="worst", kind="worst")
    report = Report([lower, mine, low, row(attack="clean", kind="clean", threat=None), worst])
    # of equal numbers the one over all attacks
    assert report.headline is worst and report.lowest == {("m", None): worst, ("m", "L2 0.5"): lower}
    assert report.attacks == ["clean", "mine", "worst", "lower", "low"]
    lines = report.to_markdown().split("\n")
    assert lines[2].startswith("- **m: 75.0") and lines[3].startswith("- m, L2 0.5: 0.0")
    with pytest.raises(ValueError, match=r"one deployed model, got none: .*row\('clean'\)"):
        _ = Report([lower]).headline
    with pytest.raises(ValueError, match=r"needs attacks on one deployed model, got m, n: use headlines"):
        _ = Report([mine, row(model="n")]).headline


def test_json_round_trip():
    report = Report([row(settings={"steps": 3, "eps": 0.1, "target": None}), row(attack="x", health=None)], ["a note"])
    text = report.to_json()
    back = Report.from_json(text)
    assert back.to_json() == text and back.notes == ["a note"]
    assert back.rows[0].robust.dtype == bool and back.rows[0].robust.tolist() == [True, False, True, True]
    assert back.rows[0].settings == {"steps": 3, "eps": 0.1, "target": None} and back.rows[1].health is None
    assert back.paired(report, "PGD").difference == 0
    small = row(health={"gradients": 10000, "nonfinite": 1, "zero": 30, "images": 0, "unmoved": 0})
    assert small.describe_health() == "0.01 % / 0.3 % / -"
    with pytest.raises(ValueError, match="got 99"):
        Report.from_json(text.replace('"format": 3', '"format": 99'))


def test_numbers_in_the_tables():
    report = merge([Report([row("a", robust=[1, 0, 0, 0])], ["note"]), Report([row("b", reliable=False)], ["note"])])
    text = report.to_markdown()
    assert '| PGD | 25.0 ± 21.7 | 75.0 ± 21.7 **<span style="color:red">unreliable</span>** |' in text
    assert "| a | PGD | as it is | - | 4 | 25.0 ± 21.7 | 25.0 | 1 | 0 % / 0 % / 0 % |  | 3 | 1.5 |" in text
    assert "40 % / 0 % / 0 %" in text and text.count("- note") == 1
    assert "**b: 75.0 ± 21.7 %** of 4 images are still classified correctly" in text
    plain, colored = report.to_text(color=False), report.to_text(color=True)
    assert "\033" not in plain and "75.0 ± 21.7 unreliable" in plain and "\033[31m75.0 ± 21.7 unreliable" in colored


@pytest.mark.parametrize(
    ("right", "n", "percent", "error", "printed"),
    [
        (373, 512, "72.85", "1.97", "72.9 ± 2.0"),
        (41, 64, "64.06", "6.00", "64.1 ± 6.0"),
    ],
)
def test_figures_published_for_atop(right, n, percent, error, printed):
    """Its specification's fact 15: counts of 512 and of 64 images."""
    made = row(robust=[1] * right + [0] * (n - right))
    assert (f"{100 * made.accuracy:.2f}", f"{100 * made.standard_error:.2f}") == (percent, error)
    assert Row.from_dict(made.to_dict()).accuracy == made.accuracy == right / n
    assert f"| m | PGD | as it is | - | {n} | {printed} |" in Report([made]).to_markdown()


def test_a_published_gain_and_its_error():
    """14.45 points = 59.18 - 44.73."""
    with_it, without = row(robust=[1] * 303 + [0] * 209), row(robust=[1] * 229 + [0] * 283)
    gain = Report([with_it]).paired(Report([without]), "PGD")
    assert f"{100 * gain.difference:.2f}" == "14.45" and gain.n == 512
    # 74 images differ, all to one side: sqrt(p (1 - p) / n), p = 74 / 512
    assert f"{100 * gain.standard_error:.2f}" == "1.55"


def test_what_cannot_be_paired_or_merged_is_refused():
    both = merge([Report([row("a")]), Report([row("b")])])
    assert both.models == ["a", "b"] and set(both.headlines) == {"a", "b"}
    assert "## Comparison" in both.to_markdown() and "| attack | a | b |" in both.to_markdown()
    paired = Report([row("a")]).paired(Report([row("b", robust=[1, 0, 0, 0])]), "PGD")
    assert str(paired) == "+50.0 ± 25.0 points (n = 4, paired)"
    with pytest.raises(ValueError, match="headlines"):
        _ = both.headline
    with pytest.raises(KeyError):
        both.row("PGD")
    with pytest.raises(ValueError, match="a: PGD"):
        merge([Report([row("a")]), Report([row("a")])])
    with pytest.raises(ValueError, match="same images"):
        Report([row("a")]).paired(Report([row("b", robust=[1, 0], data="e")]), "PGD")
    with pytest.raises(KeyError, match="PGD"):
        Report([row("a")]).paired(Report([row("b")]), "no such row")


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
    report = evaluate(model, x, y, eps=0.1, steps=2, attacks=[PGD()], n_eval=2, name="m 1", progress=False)
    report.rows[1].examples = Examples(x.numpy(), x.numpy(), y.numpy(), np.ones(6, dtype=bool), 1 - y.numpy())
    rng = torch.get_rng_state()
    report.save(tmp_path / "run", model)
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert set(os.listdir(tmp_path / "run")) == {"report.html", "report.json", "report.md"}
    assert Report.from_json((tmp_path / "run/report.json").read_text()).to_json() == report.to_json()
    assert (tmp_path / "run/report.md").read_text() == report.to_markdown()
    # five reconstructions, of which four are shown, or one purified image, beside three columns
    flipped = Purifying(lambda images: images.flatten(1)[:, :4], lambda images: images.flip(3))
    for defence, columns in ((model, 7), (None, 3), (flipped, 4)):
        assert report.to_html(defence).count("<img ") == 6 * columns
    examples = report.rows[1].examples
    arrays = [part for part in vars(examples).values() if part is not None]
    grey = Examples(*(part[:1, :1] if part.ndim > 1 else part[:1] for part in arrays))
    assert Report([row(examples=grey)]).to_html().count("<img ") == 3
    # of two channels there is no picture
    two = Examples(*(part[:, :2] if part.ndim > 1 else part for part in arrays))
    assert "<img " not in Report([row(examples=two)]).to_html()
    both = merge([report, Report([row("other", "PGD-2 ce")])])
    with pytest.raises(ValueError, match="mapping"):
        both.save(tmp_path / "two", model)
    assert both.to_html({"m 1": model}).count("<img ") == 6 * 7


def about(threat="L-inf 8/255", **more):
    return {"threat": threat, "seed": "0", **more}


def test_rows_of_different_threat_models_are_not_paired():
    """Half of the images at twice the radius says nothing about which model is better."""
    clean, other = row(attack="clean", kind="clean"), row(attack="weak", threat="L2 0.5")
    a = Report([row("a"), clean, other], about=about("L-inf 0.05"))
    b = Report([row("b", robust=[1, 0, 0, 0]), clean, other], about=about("L-inf 0.15"))
    with pytest.raises(ValueError, match=r"same threat model, got L-inf 0.05 and L-inf 0.15"):
        a.paired(b, "PGD")
    with pytest.raises(ValueError, match=r"same threat model, got L-inf 0.05 and L2 0.5"):
        a.paired(a, "PGD", "weak")
    # clean images, and rows that are within the same other threat model
    assert a.paired(b, "clean").difference == a.paired(b, "weak").difference == 0
    same = Report([row("b", robust=[1, 0, 0, 0])], about=about("L-inf 0.05"))
    assert a.paired(same, "PGD").difference == 0.5
    # a report that does not say what it is about
    assert a.paired(Report([row("b", robust=[1, 0, 0, 0])]), "PGD").difference == 0.5


def test_reports_that_differ_in_what_they_measure_are_not_merged():
    a = Report([row("a", "A")], about=about("L-inf 0.05"))
    for what, other in (("threat", about("L-inf 0.15")), ("precision", about("L-inf 0.05", precision="bfloat16"))):
        with pytest.raises(ValueError, match=f"same {what}, got different ones"):
            merge([a, Report([row("b", "B")], about=other)])
    # The rule of prediction matters for random models only.
    votes = Report([row("b", "B", deterministic=False)], about=about("L-inf 0.05", predict="votes"))
    still = Report([row("a", "A", deterministic=True)], about=about("L-inf 0.05"))
    assert merge([still, votes]).models == ["a", "b"]
    with pytest.raises(ValueError, match="same predict, got different ones"):
        merge([Report([row("a", "A", deterministic=False)], about=about("L-inf 0.05")), votes])
    unknown = merge([a, Report([row("b", "B")])])
    with pytest.raises(ValueError):
        merge([unknown, Report([row("c", "C")], about=about("L-inf 0.15"))])
    same = merge([a, Report([row("b", "C", threat="L2 0.5")], about=about("L-inf 0.05"))])
    assert same.models == ["a", "b"] and same.about["threat"] == "L-inf 0.05"
    assert same.to_text().startswith("Robustness, L-inf 0.05\n")


def test_a_report_says_what_repeats_it(tmp_path, monkeypatch):
    """Date, command, model, processor, images and seed are on the page and in Markdown; the date is kept."""
    monkeypatch.setattr("sys.argv", ["judge.py", "--fast"])
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "judge.py", "--fast"])
    torch.manual_seed(0)
    model, x = Purifier(), torch.rand(6, 3, 6, 6)
    y = model(x).argmax(1)
    report = evaluate(model, x, y, eps=0.5, steps=2, attacks=[PGD()], n_eval=2, seed=7, progress=False)
    assert not report.row("PGD-2 ce").robust.all()
    report.save(tmp_path, model)
    date = report.about["date"]
    report.save(tmp_path, model)
    assert report.about["date"] == date
    model.head.weight.data += 1
    changed = evaluate(model, x, y, eps=0.5, attacks=[], progress=False)
    assert changed.about["model"] != report.about["model"]
    told = ["python judge.py --fast", report.about["processor"], report.about["model"], date, "6", "7"]
    for name in ("report.html", "report.md"):
        assert all(value in html.unescape((tmp_path / name).read_text()) for value in told)
    # No command repeats an evaluation that was typed.
    monkeypatch.setattr("sys.argv", ["-c"])
    assert "command" not in evaluate(model, x, y, eps=0.5, attacks=[], progress=False).about


def test_the_precision_of_a_model_is_told():
    """It is told of an accelerated defence on every device, of rounded float32 only where a device rounds it."""
    cpu, gpu, model = torch.device("cpu"), torch.device("cuda"), zoo.load("digits-carso-objective")
    with float32_products():
        assert precision_name(model, gpu) is precision_name(model.accelerate(torch.float32), gpu) is None
    with float32_products(tf32=True):
        assert [precision_name(model, device) for device in (cpu, gpu)] == [None, "tf32"]
    assert precision_name(WithAggregation(model.accelerate(torch.bfloat16), "lse"), cpu) == "bfloat16"
    x, y = torch.rand(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64)
    assert evaluate(model, x, y, eps=0.1, attacks=[], progress=False).about["precision"] == "bfloat16"
    assert "precision" not in evaluate(model.accelerate(None), x, y, eps=0.1, attacks=[], progress=False).about
