"""Whether bfloat16 is fast is measured once for a machine, and every process reads this answer."""

import pytest
import torch

from purify_fast.evaluation.run.cache import RowCache
from purify_fast.ops.dispatch import records
from purify_fast.speed import processor

CPU = torch.device("cpu")


def forget():
    records.forget()
    processor._kept_ratio.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with bfloat16 and an empty folder, whose measurement the test sets."""
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(processor, "_multiplies_bfloat16", lambda: True)
    forget()
    yield lambda ratio: monkeypatch.setattr(processor, "_measured_ratio", lambda: ratio)
    forget()


def test_another_process_beside_other_work_has_the_same_answer(machine):
    machine(0.5)
    assert processor.fast_bfloat16(CPU)
    # In another process the measurement would say the opposite.
    machine(1.5)
    forget()
    assert processor.fast_bfloat16(CPU)


def test_the_verdicts_of_kernels_stay_beside_it(machine):
    records.update(CPU, {"an_op": {"sources": "1", "correct": True}})
    machine(0.5)
    assert processor.fast_bfloat16(CPU)
    forget()
    assert records.entry_of("an_op", "1", CPU)["correct"]


def test_a_folder_that_cannot_be_written_is_said(machine, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "file"))
    machine(0.5)
    assert processor.fast_bfloat16(CPU) and "each process times bfloat16 itself" in caplog.text


def test_rows_of_another_answer_are_not_used(machine, tmp_path):
    def key():
        forget()
        cache = RowCache(tmp_path / "rows")
        return cache.key({"seed": 0}, None)

    machine(0.5)
    first = key()
    records.update(CPU, {}, **{processor.RATIO: 1.5})
    assert first != key()


def test_the_measured_ratio_is_the_time_in_bfloat16_by_that_in_float32(monkeypatch):
    now = [0.0]

    def gradient(shape, weight, *rest, **options):
        now[0] += 3.0 if weight.dtype == torch.bfloat16 else 4.0

    monkeypatch.setattr(processor, "conv2d_input", gradient)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])
    assert processor._measured_ratio() == 0.75
