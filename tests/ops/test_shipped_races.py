"""The races of an NVIDIA H200 that ship: what a GPU of its architecture begins with, and how it is told."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from purify_fast.cli import installation
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import races, racing, records
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.racing import Row

ROOT = Path(__file__).parents[2]
RACED = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200" / "raced.json").read_text())
CARD = torch.device("cuda", 0)
#: This kernel has changed since it was raced.
UNRACED = {"contextual_attention"}


@pytest.fixture
def card(kernel_cache, monkeypatch) -> Callable[[str, int], None]:
    """Make up a GPU of a name and of a major compute capability, which computes nothing."""

    def make(name: str, major: int) -> None:
        facts = SimpleNamespace(name=name, major=major, minor=0, total_memory=2**36)
        answers = {"is_available": True, "current_device": 0, "device_count": 1, "get_device_name": name}
        answers |= {"get_device_capability": (major, 0), "get_device_properties": facts}
        for question, answer in answers.items():
            monkeypatch.setattr(torch.cuda, question, lambda *_, answer=answer: answer)
        records.machine.cache_clear()

    yield make
    records.machine.cache_clear()


@pytest.mark.parametrize("op", [name for name, op in REGISTRY.items() if op.launch is not None])
def test_the_races_of_the_h200_decide_on_every_card_of_its_architecture(op, card):
    """The kernel serves where it was ahead in each layout, eagerly and replayed: for every variant, dtype and size."""
    card("some other card", 9)
    wanted = REGISTRY[op].wanted
    every = racing.races_of(REGISTRY[op], CARD)
    if op in UNRACED:
        assert op not in RACED["ops"] and wanted(Call(CARD)).why.startswith("not raced")
        return
    names = [one.name for one in dataclasses.fields(Row)]
    rows = [Row(*(row[name] for name in names)) for row in RACED["ops"][op]["rows"]]
    assert {(row.example, row.variant, row.dtype, row.size, row.style) for row in rows} == {
        (race.example.name, race.example.variant, str(race.dtype)[6:], race.size, style)
        for race in every
        for style in ("eager", "replay")
    }
    ratios = defaultdict(list)
    for row in rows:
        ratios[row.call(CARD)].append(row.ratio)
    for call, own in ratios.items():
        winner = wanted(call)
        assert winner.why == f"raced on NVIDIA H200, {RACED['date']}"
        # in these races, an implementation that was used before remained in use if it was at most 5 % slower
        level = 0.95 <= min(own) < 1 / 0.95
        assert level or winner.backend == ("triton" if min(own) > 1 else "reference"), (call, own)


def test_a_card_of_another_architecture_begins_without_races(card):
    card("NVIDIA A100", 8)
    assert races.nearest(records.machine(CARD)) is None
    assert "H200" not in installation.info(True)
