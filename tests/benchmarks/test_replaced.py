"""The parts of docs/import.md compute what the lines compute that they are timed against."""

import pytest
import torch

from benchmarks.speed import replaced

RANDOM = ("nn.SampleLatent", "nn.RandomMask")


@pytest.mark.parametrize("name", [name for name in replaced.PARTS if name not in RANDOM])
def test_both_contestants_compute_the_same(name):
    part = replaced.PARTS[name]
    shapes = part.shapes[0]
    given = part.makes(*shapes) if part.makes else tuple(map(torch.randn, shapes))
    torch.testing.assert_close(part.ours(*given), part.theirs(*given), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", RANDOM)
def test_random_parts_have_the_same_distribution(name):
    part = replaced.PARTS[name]
    x = torch.full(part.shapes[-1][0], 0.3)
    ours, theirs = (function(*[x] * len(part.shapes[0]))[0] for function in (part.ours, part.theirs))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.02, atol=0.01)


def test_a_run_is_one_row_of_the_table(monkeypatch, tmp_path):
    part = replaced.PARTS["ops.pgd_step"]._replace(shapes=[((2, 3, 4, 4),) * 3])
    learning = replaced.PARTS["nn.Aggregate, mean"]._replace(shapes=[((2, 3, 4),)])
    monkeypatch.setattr(replaced, "PARTS", {"ops.pgd_step": part, "learning": learning})
    monkeypatch.setattr(replaced, "RESULTS", tmp_path)
    monkeypatch.setattr(replaced, "SECONDS", 1e-4)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (tmp_path / "cpu").mkdir()
    threads = torch.get_num_threads()
    assert replaced.main(None).exists() and torch.get_num_threads() == threads
    *_, plain, learned = replaced.table(tmp_path)
    assert plain.startswith("| ops.pgd_step | [2, 3, 4, 4] | ") and plain.endswith("| - | - |")
    assert all(float(cell) > 0 for cell in learned.split("|")[3:7])
