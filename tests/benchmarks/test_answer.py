"""The command answer adds up the parts of AutoAttack, and takes our protocols as they ran."""

import pytest
import torch
from torch import nn

from benchmarks.robustness import answer
from benchmarks.robustness.contests import FAST, OFFICIAL, OURS, Amount, Subject

NETWORK = answer.NETWORKS[1]


def row(who, first, last, seconds, left):
    made = {"network": NETWORK, "contestant": who, "first": first, "last": last, "cpu_seconds": seconds, "left": left}
    made |= {"forwards": 100 * (last - first), "gradients": 10 * (last - first)}
    return made | {"device": "D", "threads": 1, "code": []}


def test_the_parts_of_autoattack_are_added_and_incomplete_contestants_are_left_out():
    rows = [row(OURS, 0, 50, 10.0, 20), row(OURS, 0, 100, 15.0, 41), row(FAST, 0, 100, 3.0, 42)]
    rows += [row(answer.EXPERT, 0, 50, 30.0, 20), row(answer.EXPERT, 50, 100, 20.0, 22), row(OFFICIAL, 0, 50, 60.0, 20)]
    lines = [line for line in answer.markdown(rows) if line.startswith(f"| {NETWORK.partition(',')[0]}")]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert [line[:3] + line[5:] for line in cells] == [
        ["50", "**standard**", "20", "10", "0.33"],
        ["50", answer.EXPERT, "20", "30", "1.00"],
        ["50", "AutoAttack", "20", "60", "2.00"],
        ["100", "**standard**", "41", "15", "0.30"],
        ["100", "**fast**", "42", "3", "0.06"],
        ["100", answer.EXPERT, "42", "50", "1.00"],
    ]
    assert all(line[3:5] == ["100", "10"] for line in cells) and answer.markdown([]) == []


def test_the_cheap_runs_come_first_and_parts_cover_all_images():
    runs = answer.runs(120)
    assert runs[:4] == [(OURS, 0, 50), (FAST, 0, 50), (OURS, 0, 120), (FAST, 0, 120)]
    for who in (answer.EXPERT, OFFICIAL):
        assert [run[1:] for run in runs if run[0] == who] == [(0, 50), (50, 100), (100, 120)]


@pytest.mark.parametrize("fast", [True, False])
def test_an_experts_images_are_judged_by_the_network_itself(monkeypatch, fast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    x = torch.rand(6, 1, 8, 8)
    attacked, dtypes = [], []
    model[0].register_forward_hook(lambda layer, given, out: dtypes.append(out.dtype))

    def found(subject, amount):
        attacked.append(subject.model)
        assert subject.model(x).dtype == torch.float32
        return x

    monkeypatch.setattr(answer, "found_by_autoattack", found)
    monkeypatch.setattr(answer, "fast_bfloat16", lambda device: fast)
    with torch.no_grad():
        y = model(x).argmax(1)
        wrong = answer.expert(Subject(model, x, torch.where(torch.arange(6) < 2, y, (y + 1) % 10), 0.1), Amount())
    assert wrong.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    (copy,) = attacked
    assert copy is not model and not any(weight.requires_grad for weight in copy.parameters())
    assert next(copy.parameters()).dtype == (torch.bfloat16 if fast else torch.float32)
    assert next(model.parameters()).dtype == torch.float32 and model[0].weight.requires_grad
    assert (torch.bfloat16 in dtypes) == fast


def test_random_defences_have_a_table_with_the_share_of_frozen_rand():
    name = next(iter(answer.RANDOM))

    def random_row(who, seconds):
        return row(who, 0, 4, seconds, 2) | {"network": name, "one_draw": 0.625}

    rows = [random_row(FAST, 10.0), random_row(answer.FROZEN_RAND, 40.0), random_row(answer.RAND, 50.0)]
    lines = [line for line in answer.markdown(rows) if line.startswith(f"| {name}")]
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert [line[:4] + line[6:] for line in cells] == [
        ["4", "**fast**", "2", "62", "10", "0.25"],
        ["4", answer.FROZEN_RAND, "2", "62", "40", "1.00"],
        ["4", answer.RAND, "2", "62", "50", "1.25"],
    ]
    assert all(line[4:6] == ["100", "10"] for line in cells)


def test_a_random_defence_is_judged_by_fresh_draws(monkeypatch):
    torch.manual_seed(0)
    model = answer.Smoothed(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.05).eval()
    x, asked = torch.rand(4, 1, 8, 8), []

    def found(subject, amount, version):
        asked.append(any(weight.requires_grad for weight in subject.model.parameters()))
        return subject.model(x) is not None and x

    monkeypatch.setattr(answer, "found_by_autoattack", found)
    with torch.no_grad():
        y = model.network(x).argmax(1)
    subject = Subject(model, x, y, 0.1, random=True)
    frozen, plain = (answer.measured_random(subject, who, Amount(steps=2)) for who in (answer.FROZEN_RAND, answer.RAND))
    assert asked == [False, True] and frozen["forwards"] == plain["forwards"] == 4
    assert 0 <= frozen["left"] <= 4 and 0 <= frozen["one_draw"] <= 1
    ours = answer.measured_random(subject, FAST, Amount(steps=2))
    assert ours["forwards"] > ours["gradients"] > 0
