"""The study of the papers' questions keeps its rows, measures none twice, and its tables say what the rows say."""

import json

import numpy as np

from benchmarks import __main__ as program
from benchmarks.robustness.studies import papers_questions as study


def rows_of(folder):
    return json.loads((folder / study.FILE).read_text())


def test_a_quick_run_keeps_its_rows_and_goes_on(tmp_path, capsys, forking):
    words, options = ["study", "papers_questions"], ["--quick", "--out", str(tmp_path / "studies")]
    program.main([*words, "aggregation", "end_to_end", *options])
    first, said = rows_of(tmp_path / "studies"), capsys.readouterr().out
    assert [row["part"] for row in first] == ["aggregation"] * 2 + ["end_to_end"] * 2
    # The classifier alone hands all of its attacked images to the defence, in five predictions.
    alone = first[2]["numbers"]["classifier alone"]
    assert len(alone) == 5 and {len(draw) for draw in alone} == {10}
    program.main([*words, "arrest", "aggregation", *options])
    again = rows_of(tmp_path / "studies")
    assert again[:4] == first and [row["seed"] for row in again[4:]] == [0, 1, 0, 1]
    assert len(again[4]["numbers"]["drift"]) == 10 and "aggregation: " not in capsys.readouterr().out
    right = np.array([list(map(int, draw)) for draw in alone]).mean()
    assert f" {100 * right:.1f} ± " in said
