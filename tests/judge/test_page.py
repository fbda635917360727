"""The HTML page of a report says what its JSON says, needs no network, and is shown by a real browser."""

import html
import json
import re

import numpy as np
import pytest
from reports import row

from purify_fast.evaluation import Report, merge
from purify_fast.judge.alarms.signs import Finding
from purify_fast.judge.results.rows import Examples
from purify_fast.judge.show.page import html_page


@pytest.fixture
def report():
    rows = [row("clean", [1, 1, 1, 1], kind="clean"), row("PGD <b>", [1, 0, 0, 1]), row("APGD", [1, 1, 0, 0])]
    rows += [row("masked", [1, 1, 1, 1], reliable=False), row("worst", [1, 0, 0, 0], kind="worst")]
    report = Report(rows, ["a note with <script>"], {"threat": "L-inf 8/255", "version": "purify_fast 0"})
    report.findings = [Finding("missed images", "unreliable", "9 of 10 images", "Square", "m")]
    report.curves = {"m": {"steps": [[1, 0.9], [10, 0.5], [30, 0.4]]}}
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
    other = Report([row("clean", [1, 1], model="other", kind="clean"), row("PGD", [1, 1], model="other")])
    assert html_page(merge([report, other])).count('class="card') == 2


def test_a_curve_has_every_point(report):
    report.curves["m"] = {"steps of PGD": [[1, 0.9], [10, 0.5], [100, 0.4]], "one": [[1, 0.9]]}
    page = html_page(report)
    # equal factors stand at equal distances
    assert re.findall(r'<circle class="point" cx="([\d.]+)"', page) == ["50.0", "295.0", "540.0"]
    assert "Accuracy against steps of PGD" in page and "Accuracy against one" not in page
    # the axis is named, and a line is where the report's number is, of 204 units for 100 %
    (line,) = re.findall(r'<line class="headline" x1="50" y1="([\d.]+)" x2="540" y2="([\d.]+)">', page)
    assert float(line[0]) == float(line[1]) == pytest.approx(216 - 204 * report.headlines["m"].accuracy)
    assert ">accuracy, %</text>" in page


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
