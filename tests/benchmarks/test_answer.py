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
