"""The processor's instructions tell whether bfloat16 is fast: every process has the same answer."""

import pytest
import torch

from purify_fast.judge.results.cache import RowCache
from purify_fast.speed import precision as processor

CPU = torch.device("cpu")
EPYC, XEON = "AMD EPYC 9654", "Intel(R) Xeon(R) Platinum 8380H"


@pytest.mark.parametrize(
    ("name", "bf16", "tiles", "variables", "fast"),
    [
        (EPYC, True, False, {}, True),
        (EPYC, False, False, {}, False),
        (XEON, True, True, {}, True),
        (XEON, True, False, {}, False),
        (XEON, True, True, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
        (EPYC, True, False, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (EPYC, True, False, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (EPYC, True, False, {"ATEN_CPU_CAPABILITY": "avx2"}, False),
    ],
)
def test_tiles_or_a_processor_of_amd_make_bfloat16_fast(monkeypatch, name, bf16, tiles, variables, fast):
    for variable in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(processor, "processor", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert processor.fast_bfloat16(CPU) == fast


def test_rows_of_another_answer_are_not_used(monkeypatch, tmp_path):
    def key(fast):
        monkeypatch.setattr("purify_fast.judge.results.cache.fast_bfloat16", lambda device: fast)
        return RowCache(tmp_path / "rows").key({"seed": 0}, None)

    assert key(True) == key(True) != key(False)
