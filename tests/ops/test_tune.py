"""Kernels are raced on the machine they run on, and who was ahead serves: `purify-fast tune` and the file it writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from purify_fast import _library, cli
from purify_fast.cli import installation
from purify_fast.ops import REGISTRY, aggregate, pgd_step, sample_latent
from purify_fast.ops.dispatch import examples, racing, verify
from purify_fast.ops.dispatch.op import Call, size_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")
TINY = {"cpu": {"small": 2**10, "medium": 2**17, "large": 2**20}}


@pytest.fixture(autouse=True)
def folder(kernel_cache, monkeypatch) -> Path:
    """An empty folder, and races that are soon over."""
    monkeypatch.setattr(racing, "RUN", 1e-5)
    monkeypatch.setattr(racing, "ELEMENTS", TINY)
    return kernel_cache


def row(example: str, variant: str, dtype: str, size: str, *, kernel_us: float, style: str = "eager") -> racing.Row:
    """A row of a race in which the reference took a microsecond."""
    return racing.Row(example, variant, dtype, size, style, 1.0, kernel_us)


def timed(monkeypatch, seconds: dict[str, float]) -> None:
    """Let each run take what is said here of its backend, in place of what the clock says."""

    def fastest(calls, device):
        for call in calls:
            call()
        return [seconds["reference"], seconds["kernel"]]

    monkeypatch.setattr(racing, "fastest", fastest)


@pytest.mark.slow
def test_who_wins_serves_and_it_is_said(folder, monkeypatch, capsys):
    """The kernel of the l-infinity step, which serves as it ships, is made ten times as slow, and then as fast."""
    op, wide = REGISTRY["pgd_step"], torch.float32
    assert op.serving(Call(CPU, "linf", wide, 10)) == "cpp"
    timed(monkeypatch, {"reference": 1e-6, "kernel": 1e-5})
    assert cli.main(["tune", "--device", "cpu", "--ops", "pgd_step"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert op.serving(Call(CPU, "linf", wide, 10)) == "reference"
    x = torch.rand(2, 3, 4, 4)
    pgd_step(x, x, x, 0.1, 0.2)
    assert op.served[Call(CPU, "linf", wide, (96).bit_length())] == "reference"
    assert op.serving(Call(CPU, "l1", wide, style="graph")) == "cpp"  # not raced here: as it ships
    shown = next(line for line in installation.info(True).splitlines() if line.startswith("pgd_step "))
    assert "raced on this machine" in shown and "raced on AMD EPYC" in shown
    timed(monkeypatch, {"reference": 1e-5, "kernel": 1e-6})
    assert cli.main(["tune", "--device", "cpu", "--ops", "pgd_step"]) == 0
    assert op.serving(Call(CPU, "linf", wide, 10)) == "cpp"


def test_dtype_and_size_decide(monkeypatch):
    """A race by dtype and size is served by dtype and size; where one of them is not known, by what won everywhere."""
    op = REGISTRY["sample_latent"]
    lost = {("float32", "small")}

    def run_race(race, device, capture=None):
        dtype = str(race.dtype).removeprefix("torch.")
        kernel = 2.0 if (dtype, race.size) in lost else 0.5
        return [row(race.example.name, "", dtype, race.size, kernel_us=kernel)]

    monkeypatch.setattr(racing, "run_race", run_race)
    racing.tune(CPU, ops=["sample_latent"])
    asked = {
        (torch.float32, 10): "reference",
        (torch.float32, 18): "cpp",
        (torch.float32, 30): "cpp",
        (torch.bfloat16, 10): "cpp",
        (torch.float32, 0): "reference",
        (None, 0): "reference",
        (torch.float64, 10): "reference",  # not raced
    }
    for (dtype, bits), backend in asked.items():
        assert op.serving(Call(CPU, "", dtype, bits)) == backend, (dtype, bits)


def test_a_kernel_must_be_ahead_in_every_layout_and_in_the_replay(monkeypatch):
    op = REGISTRY["pgd_step"]
    rows = [
        row("a", "linf", "float32", "small", kernel_us=1 / 3.0),
        row("a channels_last", "linf", "float32", "small", kernel_us=1 / 3.0),
        row("a", "l2", "float32", "small", kernel_us=1 / 3.0),
        row("a", "l2", "float32", "small", style="replay", kernel_us=1 / 0.5),
    ]
    cells = racing.decide(op, rows, CPU)["cells"]
    winners = {name: cells[name]["eager"] for name in ("", "l2", "linf")}
    assert winners == {"": "reference", "l2": "reference", "linf": "cpp"}
    rows[1] = row("a channels_last", "linf", "float32", "small", kernel_us=1 / 0.5)
    assert racing.decide(op, rows, CPU)["cells"]["linf"]["eager"] == "reference"


def test_a_wrong_kernel_is_not_raced_and_an_error_ends_no_other_race(monkeypatch):
    real = verify.verdict_of

    def verdict_of(op, device):
        verdict = real(op, device)
        return verdict if op.name != "philox" else replace(verdict, error=1.0)

    def run_race(race, device, capture=None):
        if race.op == "stitch":
            raise MemoryError("no room")
        return [row(race.example.name, race.example.variant, "float32", race.size, kernel_us=0.5)]

    monkeypatch.setattr(racing, "verdict_of", verdict_of)
    monkeypatch.setattr(racing, "run_race", run_race)
    rows, failed = racing.tune(CPU, ops=["philox", "stitch", "noisy_replay"])
    assert set(rows) == {"noisy_replay"}
    assert "its kernel is WRONG here" in failed.pop("philox")
    assert set(failed.values()) == {"MemoryError: no room"} and all(name.startswith("stitch ") for name in failed)


def test_replays_are_captured_by_what_recovers(rerun):
    """The call runs aside before it is captured; where that fails the race is named, and the next one begins."""
    race = racing.races_of(REGISTRY["noisy_replay"], CPU)[0]
    assert [one.style for one in racing.run_race(race, CPU, capture=rerun)] == ["eager", "replay"]
    assert rerun.recorded == 2 and rerun.replayed > 2
    rerun.error = RuntimeError("cannot be captured")
    rows, failed = racing.tune(CPU, ops=["noisy_replay"], capture=rerun)
    assert not rows and len(failed) == len(racing.races_of(REGISTRY["noisy_replay"], CPU))
    assert set(failed.values()) == {"RuntimeError: cannot be captured"}


def test_a_folder_that_cannot_be_written_is_refused_before_any_race(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "file" / "below"))  # root may write anywhere else
    monkeypatch.setattr(racing, "run_race", None)
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "set PURIFY_FAST_CACHE to a writable folder" in capsys.readouterr().err
    assert REGISTRY["philox"].wanted(Call(CPU)).backend == "cpp"  # as it ships


def test_what_cannot_be_raced_is_refused(capsys):
    assert cli.main(["tune", "--device", "cpu", "--ops", "nothing"]) == 2
    assert "ops must name ops with a kernel for cpu, got 'nothing': allowed are " in capsys.readouterr().err


def test_a_call_has_the_size_key_of_its_race():
    """A public function and the race of its op need the same key, or the verdict would not be found."""
    for op in (op for op in REGISTRY.values() if op.kernel("cpu") != "reference"):
        race = racing.races_of(op, CPU)[0]
        arguments = examples.tile(race.example.make(race.dtype, 0), race.times)
        dtype, numel = op.size_key(*arguments)
        assert size_of(numel.bit_length()) == race.size and dtype == race.dtype, op.name
    for op in (op for op in REGISTRY.values() if op.launch is not None):
        for example in op.raced:
            dtype = next(one for one in racing.DTYPES if one in example.dtypes)
            assert op.size_key(*example.make(dtype, 0))[0] == dtype, (op.name, example.name)
    logits, mu = torch.rand(4, 5, 7, requires_grad=True), torch.rand(4, 9, requires_grad=True)
    aggregate(logits, "peel").sum().backward()
    sample_latent(mu, mu, torch.tensor([7]), torch.arange(4))[0].sum().backward()
    wanted = {"aggregate": (4 * 5 * 7, "peel"), "sample_latent": (4 * 9, "")}
    for name, (numel, variant) in wanted.items():
        call = Call(CPU, variant, torch.float32, numel.bit_length())
        assert call in REGISTRY[name].served and call in REGISTRY[f"{name}_backward"].served, name
