"""Every idea of the protocols is measured by itself, once."""

import argparse

import pytest

from benchmarks import ideas

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_idea_is_measured_once_and_none_finds_less_than_what_is_before_it(tmp_path, monkeypatch):
    chosen = argparse.Namespace(only=["digits-pgd-at"], data=None, network=None, images=6, out=tmp_path)
    table = ideas.main(chosen)
    results = {(one["part"], one["idea"]): one for one in ideas.read(tmp_path)}
    assert len(results) == sum(len(part) for _, part in ideas.IDEAS.values())
    first = results["the first attack", "margin, 10 steps"]
    assert first["of"] == 6 and 1 <= first["gradients"] <= 10 < first["forwards"] + 3
    nine = results["after 10 steps on the margin", "nine targets by distance, 100 steps"]
    for (part, _), one in results.items():
        assert part == "the first attack" or one["left"] <= first["left"]
        assert part != "after nine targets" or one["left"] <= nine["left"]
    monkeypatch.setattr(ideas, "measured", None)
    assert ideas.main(chosen) == table and f"| margin, 10 steps | {first['left']} (" in table
