"""Signs of masked gradients come before the attacks, and where they are found every search runs to its end."""

import numpy as np
import pytest
from digit_nets import EPS, held_out, robust, standard
from evaluating import evaluate
from reports import probed
from small_models import Made

from purify_fast.attacks import PGD
from purify_fast.judge.alarms.signs import signs_of_masking


def rounded():
    """The standard network behind a step without a gradient."""
    return Made(lambda self, x: self.net((x * 4).round() / 4), net=standard())


def judged(model, n=48, **options):
    return evaluate(model, *held_out(n), **{"eps": EPS, "protocol": "fast", "steps": 30} | options)


def searched_early(report):
    """The attacks that stop early or leave images out."""
    names = ("until", "nearest")
    return [row.attack for row in report.rows if any(row.settings.get(name) for name in names)]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["fast", "standard"])
def test_where_gradients_are_masked_searches_run_to_their_end_and_surrogates_join(protocol):
    report = judged(rounded(), n=24, protocol=protocol)
    (note,) = [note for note in report.notes if "masked gradients" in note]
    assert not searched_early(report) and not any(row.settings.get("give_up") for row in report.rows)
    joined = [row for row in report.rows if "by the gradients of" in row.attack]
    assert joined and f"{len(joined)} rows" in note
    assert min(row.accuracy for row in joined) == report.headline.accuracy < report.row("APGD-10 margin").accuracy
    # a list of attacks is run as it is, and without probes nothing is known before
    assert not any("masked" in note for note in judged(rounded(), n=24, protocol=protocol, probes=False).notes)
    own = judged(rounded(), n=24, protocol=None, attacks=[PGD(steps=2)], probes=True)
    assert own.attacks == ["clean", "PGD-2 ce", "worst"] and not any("masked" in note for note in own.notes)


@pytest.mark.slow
def test_an_honest_model_is_attacked_as_without_the_signs():
    alone, asked = (judged(robust(), n=40, protocol="standard", probes=probes) for probes in (False, True))
    assert alone.attacks == asked.attacks and searched_early(asked)
    assert not any("masked" in note for note in asked.notes)
    for one, other in zip(alone.rows, asked.rows, strict=True):
        assert one.settings == other.settings and not other.fell_to_probes
        assert (one.robust == other.robust).all() and one.health == other.health
        if one.margins is not None:
            assert np.array_equal(one.margins, other.margins, equal_nan=True)


def test_kept_rows_and_signs_are_used_again(tmp_path, made_rows):
    once = judged(rounded(), n=24, out=tmp_path)
    made = len(made_rows)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    again = judged(rounded(), n=24, out=tmp_path)
    assert len(made_rows) == made and again.attacks == once.attacks and again.notes == once.notes
    assert again.findings == once.findings and again.curves == once.curves
    # No file was written, neither of a row nor of a probe.
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == kept


@pytest.mark.parametrize(
    "measured, fires",
    [
        ({}, False),
        ({"cosine": "zero gradient"}, True),
        ({"cosine": 0.5}, True),
        ({"cosine": 0.7}, False),
        ({"without_gradient": 0.03}, False),
        ({"without_gradient": 0.2}, True),
        ({"copies": {"one": [1] * 2 + [0] * 62, "two": [0] * 62 + [1] * 2}}, False),
        ({"copies": {"one": [1] * 4 + [0] * 60, "two": [0] * 60 + [1] * 4}}, True),
    ],
)
def test_how_much_is_a_sign(measured, fires):
    assert bool(signs_of_masking(probed(**measured), False)) is fires


def test_a_random_model_loses_images_to_many_attacks_by_luck():
    several = {name: [1] * 3 + [0] * 61 for name in ("one", "two", "three")}
    assert signs_of_masking(probed(copies=several), False) and not signs_of_masking(probed(copies=several), True)
    assert signs_of_masking(probed(copies={"one": [1] * 8 + [0] * 56}), True)
