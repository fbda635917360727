"""Every idea of the protocols is measured by itself, once; what ran before it runs once for all."""

import argparse

import pytest

from benchmarks.pages import fill
from benchmarks.robustness import ideas

pytestmark = pytest.mark.usefixtures("one_thread")
SUBJECT = "digits-pgd-at, training images 1 to 500"


@pytest.mark.slow
def test_every_idea_is_measured_once_and_none_finds_less_than_what_is_before_it(tmp_path, monkeypatch):
    chosen = argparse.Namespace(only=[SUBJECT], data=None, images=4, out=tmp_path / "cpu")
    chosen.out.mkdir()
    began = []
    ran = ideas.ran

    def counted(*attacks, **options):
        idea = ran(*attacks, **options)
        return lambda turn: (began.append(attacks), idea(turn))

    monkeypatch.setattr(ideas, "ran", counted)
    table = ideas.main(chosen)
    results = {(one["part"], one["idea"]): one for one in ideas.read(chosen.out)}
    assert [*results] == ideas.NAMES and len(ideas.NAMES) <= ideas.MOST
    # the attacks before each part ran once for all of its ideas
    assert began == [tuple(before) for before, _ in ideas.IDEAS.values()]
    for one in results.values():
        assert one["left"] <= one["before"] <= one["of"] == 4 and one["forwards"] > 0 and one["commit"]
    assert len({one["before"] for (part, _), one in results.items() if part == "after nine targets"}) == 1
    monkeypatch.setattr(ideas, "Bench", None)
    assert ideas.main(chosen) == table == fill.table("ideas", tmp_path)
    first = results["after 10 steps on the margin", "four targets, 50 steps"]
    assert f"| four targets, 50 steps | {first['left']} (" in table and "code:" not in table


def test_numbers_of_an_idea_that_has_left_the_sources_stay():
    row = {"subject": "s", "before": 5, "left": 4, "forwards": 1.0, "gradients": 1.0, "commit": "0123abcd"}
    part, idea = ideas.NAMES[0]
    lines = ideas.markdown([row | {"part": part, "idea": idea}, row | {"part": part, "idea": "left"}])
    assert lines[-2:] == [f"| {idea} | 4 (1/1) |", "| left (code: 0123abcd) | 4 (1/1) |"]
