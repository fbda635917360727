"""The rows of several models: what is merged, and what is refused."""

import json

import numpy as np
import pytest

from benchmarks.robustness.merged import merge, read_rows
from purify_fast.evaluation import Report, Row


def row(attack="PGD", model="a", robust=(1, 0, 1, 1), **options):
    return Row(model, attack, "attack", np.array(robust, dtype=bool), n_eval=1, seed=0, data="d", **options)


def about(threat="L-inf 8/255", **more):
    return {"threat": threat, "seed": "0", **more}


def test_the_table_and_the_file_of_two_models(tmp_path):
    rows = row(robust=(1, 0, 0, 0)), row(model="b | c", reliable=False), row("other", model="b | c")
    both = merge([Report([rows[0]], ["note"]), Report([*rows[1:]], ["note"])])
    assert both.models == ["a", "b | c"] and both.notes == ["note"]
    assert both.comparison()[0] == r"| attack | a | b \| c |"
    assert (
        both.comparison()[2].startswith("| PGD | 25.0 ± 21.7 | 75.0 ± 21.7 ") and "unreliable" in both.comparison()[2]
    )
    assert both.comparison()[3] == "| other | - | 75.0 ± 21.7 |"
    both.save(tmp_path / "study" / "report.json")
    read = read_rows(tmp_path / "study" / "report.json")
    assert [each.to_dict() for each in read] == [each.to_dict() for each in both.rows]
    content = json.loads((tmp_path / "study" / "report.json").read_text()) | {"format": 99}
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="got 99"):
        read_rows(tmp_path / "report.json")


def test_reports_that_differ_in_what_they_measure_are_not_merged():
    a = Report([row("A")], about=about("L-inf 0.05"))
    for what, other in (("threat", about("L-inf 0.15")), ("precision", about("L-inf 0.05", precision="bfloat16"))):
        with pytest.raises(ValueError, match=f"same {what}, got different ones"):
            merge([a, Report([row("B", model="b")], about=other)])
    # The rule of prediction matters for random models only.
    votes = Report([row("B", model="b", deterministic=False)], about=about("L-inf 0.05", predict="votes"))
    still = Report([row("A", deterministic=True)], about=about("L-inf 0.05"))
    assert merge([still, votes]).models == ["a", "b"]
    with pytest.raises(ValueError, match="same predict, got different ones"):
        merge([Report([row("A", deterministic=False)], about=about("L-inf 0.05")), votes])
    unknown = Report([row("B", model="b")])
    assert merge([a, unknown]).about["threat"] == "L-inf 0.05"
    with pytest.raises(ValueError, match="same threat"):
        merge([a, unknown, Report([row("C", model="c")], about=about("L-inf 0.15"))])
    with pytest.raises(ValueError, match="a: A"):
        merge([a, a])


def test_a_changed_protocol_is_not_the_same():
    usual = Report([row(model="other")], about=about(protocol="fast"))
    changed = Report([row(model="m")], about=about(protocol="fast", changed="steps 2"))
    for order in ([usual, changed], [changed, usual]):
        assert not {"protocol", "changed"} & merge(order).about.keys()
