"""The count of how much faster several processes are, by the order in which the package hands batches out."""

import statistics

import pytest

from benchmarks import RESULTS
from benchmarks.kept import rows_of
from benchmarks.speed import processes
from benchmarks.speed.processes import recorded, simulated


def trace(ahead, before=0.0):
    """Two attacks of three batches, of one second each."""
    batches = [["a", "b", "c"], ["d", "e", "f"]]
    tasks = [[attack, 0, names] for attack, names in enumerate(batches)]
    lists = [
        {"before": before, "tasks": tasks[attack : None if ahead else attack + 1], "needed": needed}
        for attack, needed in enumerate(
            [[f"{attack} 0 {name}" for name in names] for attack, names in enumerate(batches)]
        )
    ]
    return {"lists": lists, "seconds": {place: 1.0 for each in lists for place in each["needed"]}, "after": 0.0}


def test_no_process_waits_while_a_later_attack_has_batches():
    # An attack of three batches keeps two processes for two seconds, if the next one cannot begin before its end.
    assert [round(simulated(trace(ahead), 2), 1) for ahead in (False, True)] == [4.0, 3.0]
    # While the first process works alone before the second attack, the other one makes two batches of that attack.
    assert simulated(trace(True, before=2.0), 1) == pytest.approx(10.0)
    assert simulated(trace(True, before=2.0), 2) == pytest.approx(6.0, abs=0.2)


def test_batches_that_are_not_needed_take_time_too():
    """The second attack gets another image than was predicted."""
    made = trace(True)
    made["lists"][1]["tasks"] = [[1, 0, ["g"]]]
    made["lists"][1]["needed"] = ["1 0 g"]
    made["seconds"]["1 0 g"] = 1.0
    # The first process has one batch less to make, but the other one still makes one for nothing.
    assert simulated(made, 1) == pytest.approx(4.0)
    assert simulated(made, 2) == pytest.approx(3.0, abs=0.2)


def test_an_error_in_a_simulated_process_is_raised():
    made = trace(True)
    made["seconds"]["0 0 b"] = "a word"
    with pytest.raises(TypeError):
        processes.simulated(made, 3)


@pytest.mark.parametrize("row", rows_of(RESULTS / "cpu" / processes.FILE), ids=lambda row: row["model"])
def test_more_processes_are_faster_on_the_page(row):
    seconds = [statistics.median(row["measured"][name]) for name in ("1", "2")]
    seconds += [simulated(trace, int(name)) for name, trace in row["traces"].items()]
    assert sorted(seconds, reverse=True) == seconds
    for trace in row["traces"].values():
        assert {place for each in trace["lists"] for place in each["needed"]} <= trace["seconds"].keys()
    # Without the batches of later attacks it would be less.
    found = row["traces"]["8"]
    bare = found | {"lists": [each | {"tasks": each["tasks"][:1]} for each in found["lists"]]}
    assert simulated(bare, 8) > simulated(found, 8)


@pytest.mark.slow
def test_a_recorded_evaluation():
    """The first process names early the images that later attacks need, and these names are mostly right."""
    found = recorded("digits-pgd-at", 12, "", 8)
    needed = {place for each in found["lists"] for place in each["needed"]}
    assert needed <= found["seconds"].keys()
    early = {
        f"{attack} {run} {name}"
        for each in found["lists"]
        for attack, run, names in each["tasks"][1:]
        for name in names
    }
    own = [
        {f"{attack} {run} {name}" for attack, run, names in each["tasks"][:1] for name in names}
        for each in found["lists"]
    ]
    late = set().union(*own[-4:])
    assert len(late & early) >= 0.8 * len(late) > 0
    assert simulated(found, 3) < simulated(found, 1)
