"""What `make cuda-check` reads out of nvcc's answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tests/cpp/cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spills_are_seen(cuda_check):
    log = """ptxas info    : Compiling entry function 'one' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'two' for 'sm_120'
    16 bytes stack frame, 12 bytes spill stores, 100 bytes spill loads"""
    assert cuda_check.spills(log) == ["two (sm_120): 12 bytes spilled, 100 loaded"]


def test_instructions_are_looked_for(cuda_check):
    good = "\n".join(cuda_check.INSTRUCTIONS["decode_samples"])
    assert cuda_check.missing_or_wrong(good, "decode_samples") == []
    assert cuda_check.missing_or_wrong("ld.global.nc.v4.u32", "decode_samples")[0].startswith("no mma.sync")
    for what in ("add.rn.f64 %fd1", ".local .align 8"):
        assert cuda_check.missing_or_wrong(f"{good}\n{what}", "decode_samples")


def test_every_source_says_what_it_rests_on(cuda_check):
    assert {path.stem for path in ROOT.glob("csrc/cuda/*.cu")} == set(cuda_check.INSTRUCTIONS)


def test_the_inner_loop_is_measured(cuda_check):
    """From the first load to the last product, unless a branch lies between."""
    step = "/*0010*/ LDSM.16.M88.4 R4, [R2] ;\n" + "/*0020*/ HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n" * 64
    sass = "/*0000*/ @P0 BRA 0x40 ;\n" + step + "/*0030*/ @P1 BRA 0x10 ;\n"
    assert cuda_check.loops(sass) == [(65, 64)] and cuda_check.too_long(sass) == []
    padded = sass.replace("[R2] ;", "[R2] ;\n" + "/*0018*/ MOV R1, R2 ;\n" * 46)
    assert cuda_check.too_long(padded) == ["111 instructions for 64 products, more than 110"]
    split = sass.replace("[R2] ;", "[R2] ;\n/*0018*/ @P2 BRA 0x30 ;\n")
    assert cuda_check.too_long(split.replace("HMMA", "NOP", 1))[0].startswith("no stretch of 64")
