"""`purify-fast tune` times kernels on this machine, and writes from which size on each is used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from purify_fast import _library, cli
from purify_fast.cli import installation
from purify_fast.ops import REGISTRY, pgd_step
from purify_fast.ops.dispatch import tuning, verify

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
SIZES = [2**10, 2**14, 2**17]


@pytest.fixture(autouse=True)
def folder(kernel_cache, monkeypatch) -> Path:
    """An empty folder, and measurements that are soon over."""
    monkeypatch.setattr(tuning, "SECONDS", 1e-5)
    monkeypatch.setitem(tuning.SIZES, "cpu", SIZES)
    return kernel_cache


def timed(monkeypatch, ahead: bool) -> None:
    """Let the kernels be ten times as fast as the references, or ten times as slow, in place of what a clock says."""

    def seconds(call):
        call()
        return 1.0 if (call.func in kernels) == ahead else 10.0

    kernels = [op.handle for op in REGISTRY.values()]
    monkeypatch.setattr(tuning, "seconds", seconds)


@pytest.mark.slow
def test_the_faster_one_is_used_and_it_is_said(folder, monkeypatch, capsys):
    op = REGISTRY["pgd_step"]
    assert op.backend_for(CPU, 1, "linf") == "cpp"
    timed(monkeypatch, ahead=False)
    assert cli.main(["tune", "--device", "cpu", "--ops", "pgd_step"]) == 0
    shown = capsys.readouterr().out
    assert str(folder) in shown and "not timed" not in shown
    cells = [line.split()[-4:] for line in shown.splitlines() if line.startswith("pgd_step")]
    assert cells == [["0.10", "0.10", "0.10", "never"]] * 3
    x = torch.rand(2, 3, 4, 4)
    pgd_step(x, x, x, 0.1, 0.2)
    assert op.backend_for(CPU, 10**9, "linf") == "reference"
    (line,) = (line for line in installation.info(True).splitlines() if line.startswith("pgd_step "))
    assert "  reference  " in line and "tuned on this machine, 2" in line
    assert any("  shipped; " in line for line in installation.info(True).splitlines())
    timed(monkeypatch, ahead=True)
    assert cli.main(["tune", "--device", "cpu", "--ops", "pgd_step"]) == 0 and op.backend_for(CPU, 1, "linf") == "cpp"


SPEEDUPS = [
    ({10: 2.0, 100: 1.5, 1000: 3.0}, 0),
    ({10: 0.9, 100: 1.5, 1000: 3.0}, 100),
    ({1000: 3.0, 100: 0.5, 10: 2.0}, 1000),
    ({10: 2.0, 100: 1.5, 1000: 0.9}, None),
]


@pytest.mark.parametrize(("speedup", "smallest"), SPEEDUPS)
def test_the_smallest_size_from_which_on_a_kernel_is_faster(speedup, smallest):
    assert tuning.smallest_size(speedup) == smallest


def test_a_wrong_kernel_is_not_timed_and_an_error_ends_no_other_measurement(monkeypatch):
    real = verify.verdict_of

    def verdict_of(op, device):
        verdict = real(op, device)
        return verdict if op.name != "philox" else replace(verdict, error=1.0)

    def seconds(call):
        if call.func in (REGISTRY["stitch"].reference, REGISTRY["stitch"].handle):
            raise MemoryError("no room")
        return 1.0

    monkeypatch.setattr(tuning, "verdict_of", verdict_of)
    monkeypatch.setattr(tuning, "seconds", seconds)
    speedups, failed = tuning.tune(CPU, ["philox", "stitch", "noisy_replay"])
    assert speedups == {("noisy_replay", ""): dict.fromkeys(SIZES, 1.0)}
    reasons = {name.partition(" ")[0]: why for name, why in failed.items()}
    assert reasons["stitch"] == "MemoryError: no room" and "its kernel is WRONG here" in reasons["philox"]


def test_a_folder_that_cannot_be_written_is_refused_before_any_measurement(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "file" / "below"))  # root may write anywhere else
    monkeypatch.setattr(tuning, "time_kernels", None)
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "set PURIFY_FAST_CACHE to a writable folder" in capsys.readouterr().err


def test_what_cannot_be_timed_is_refused(capsys):
    assert cli.main(["tune", "--device", "cpu", "--ops", "nothing"]) == 2
    assert "ops must name ops with a kernel for cpu, got 'nothing': allowed are " in capsys.readouterr().err
