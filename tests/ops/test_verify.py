"""Kernels are compared with their definition at first use, once for a machine, and one that is wrong does not serve."""

import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from purify_fast import _library
from purify_fast.ops import REGISTRY, kernels_now, use_backend
from purify_fast.ops.dispatch import choices, records, registry, verify
from purify_fast.ops.dispatch.examples import Example

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(kernel_cache) -> Path:
    return kernel_cache


_numbers = itertools.count()


@pytest.fixture
def make(monkeypatch) -> Callable[[Callable], registry.Op]:
    """Registers an op that doubles, with a kernel of the test's."""

    def made(kernel: Callable, exact: bool = False) -> registry.Op:
        name = f"doubled_{next(_numbers)}"
        example = Example(
            "3x4", lambda dtype, seed: (torch.linspace(-1, 1, 12).view(3, 4).to(dtype),), exact=exact, gpu="fbh"
        )
        torch.library.define(f"purify_fast::{name}_", "(Tensor x) -> Tensor")  # makes the name space known
        before = dict(REGISTRY)
        monkeypatch.setattr(_library, "has_kernel", lambda qualified, key: key == "CPU")
        functions = {"reference": lambda x: 2 * x, "fake": lambda x: x.new_empty(x.shape)}
        served = {"examples": [example], "cpu": 0, "in_graphs": {"cpu": ("",)}}
        op = registry.define_op(name, "(Tensor x) -> Tensor", **functions, **served)
        torch.library.impl(f"purify_fast::{name}", "CPU", kernel)
        REGISTRY.clear()
        REGISTRY.update(before)
        monkeypatch.setitem(REGISTRY, name, op)
        return op

    return made


def counted(kernel: Callable) -> Callable:
    def call(x: Tensor) -> Tensor:
        call.calls += 1
        return kernel(x)

    call.calls = 0
    return call


def kept(folder: Path) -> dict:
    (path,) = folder.glob("kernels-cpu-*.json")
    return json.loads(path.read_text())


def passed(entry: dict) -> bool:
    return verify.Verdict(**entry["verdict"]).passed


def test_a_right_kernel_serves_after_one_verification(make, folder):
    kernel = counted(lambda x: x + x)
    op = make(kernel)
    assert op(torch.ones(2)).tolist() == [2, 2] and op.backend_for(CPU, 1) == "cpp"
    calls = kernel.calls
    assert calls == 1 + 3  # the call and three dtypes
    op(torch.ones(2))
    choices.forget_choices()
    assert op.backend_for(CPU, 1) == "cpp" and kernel.calls == calls + 1
    verdict = kept(folder)["ops"][op.name]["verdict"]
    assert verdict["status"] == "compared" and verdict["error"] <= verdict["budget"]


WRONG_KERNELS = [
    lambda x: 2 * x + 1e-2,
    lambda x: torch.full_like(x, torch.nan),
    lambda x: torch.zeros_like(x),
    lambda x: 2 * x.flatten(),
    lambda x: (2 * x).double(),
]


@pytest.mark.parametrize("wrong", WRONG_KERNELS, ids=["inaccurate", "nan", "zero", "shape", "dtype"])
def test_a_wrong_kernel_does_not_serve_and_one_warning_says_so(make, folder, wrong):
    op = make(wrong)
    with pytest.warns(RuntimeWarning, match=rf"the cpp kernel of {op.name} is wrong on .* `purify-fast info`"):
        assert op(torch.ones(2)).tolist() == [2, 2]
    assert op.backend_for(CPU, 1) == "reference" and not passed(kept(folder)["ops"][op.name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices.forget_choices()
        assert op(torch.ones(2)).tolist() == [2, 2]  # the verdict is kept
    with use_backend("cpp"):  # who forces it gets it
        assert op.backend_for(CPU, 1) == "cpp"


def test_bits_must_agree_where_the_example_says_so(make):
    nearly = lambda x: torch.nextafter(2 * x, torch.ones_like(x)) if x.dtype == torch.float32 else 2 * x  # noqa: E731
    assert make(nearly).backend_for(CPU, 1) == "cpp"
    with pytest.warns(RuntimeWarning, match="where 0 is allowed"):
        assert make(nearly, exact=True).backend_for(CPU, 1) == "reference"


def test_a_result_that_jumps_is_judged_as_a_whole():
    """One number on the other side of a jump says nothing, a tenth of everything does."""
    jumping = Example("jumps", lambda dtype, seed: (), jumps=True)
    golden = torch.randn(40, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = golden.float()
    flipped, scaled = same.clone(), same * 1.11
    flipped[3, 7] += 2.0
    assert verify.deviation(flipped, golden, same, jumping, "").passed
    assert not verify.deviation(scaled, golden, same, jumping, "").passed
    assert not verify.deviation(flipped, golden, same, Example("smooth", jumping.make), "").passed


def test_bits_that_jump_are_judged_by_their_share():
    """Each bit counts the same, whatever its place in its word."""
    jumping = Example("jumps", lambda dtype, seed: (), jumps=True)
    golden = torch.randint(-(2**31), 2**31, (20, 50), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    few, many = golden.clone(), golden ^ 1
    few[3, 7] ^= -(2**31)
    assert verify.deviation(golden, golden, few, jumping, "").passed
    assert verify.deviation(few, golden, golden, jumping, "").passed
    assert not verify.deviation(many, golden, golden, jumping, "").passed
    assert not verify.deviation(few, golden, golden, Example("smooth", jumping.make), "").passed


ERRORS = (RuntimeError("no such instruction"), MemoryError("no room"), torch.OutOfMemoryError("x"))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_kernel_that_raises_does_not_serve_and_is_tried_again_by_the_next_process(make, folder, error):
    def failing(x: Tensor) -> Tensor:
        raise error

    op = make(failing)
    with pytest.warns(RuntimeWarning, match=f"cannot be run.*{error}"):
        assert op.backend_for(CPU, 1) == "reference"
    assert not list(folder.glob("kernels-*.json"))


def test_a_stale_verdict_counts_for_nothing(make, folder):
    kernel = counted(lambda x: x + x)
    op = make(kernel)
    assert op.backend_for(CPU, 1) == "cpp" and kernel.calls == 3
    (path,) = folder.glob("kernels-cpu-*.json")
    for where, name, value in (("ops", "sources", "of another build"), ("machine", "torch", "1.0")):
        content = json.loads(path.read_text())
        (content["ops"][op.name] if where == "ops" else content["machine"])[name] = value
        path.write_text(json.dumps(content))
        records._contents.clear()
        choices.forget_choices()
        before = kernel.calls
        assert op.backend_for(CPU, 1) == "cpp" and kernel.calls == before + 3
        assert kept(folder)["machine"] == records.machine(CPU)
        assert kept(folder)["ops"][op.name]["sources"] == op.code_hash("cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"machine": {}}', '{"machine": 1, "ops": 2}'])
def test_a_damaged_file_is_replaced(make, folder, content):
    op = make(lambda x: x + x)
    folder.mkdir()
    records.file_of(CPU).write_text(content)
    assert op.backend_for(CPU, 1) == "cpp" and passed(kept(folder)["ops"][op.name])


def test_a_folder_that_cannot_be_written(make, folder, caplog):
    """The verdict then lasts as long as the process, which says so once."""
    folder.parent.joinpath("file").write_text("")
    os.environ["PURIFY_FAST_CACHE"] = str(folder.parent / "file" / "below")  # root may write anywhere else
    kernel = counted(lambda x: x + x)
    first, second = make(kernel), make(kernel)
    assert first.backend_for(CPU, 1) == second.backend_for(CPU, 1) == "cpp" and kernel.calls == 6
    assert first.backend_for(CPU, 1) == "cpp" and kernel.calls == 6
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_no_mode_of_the_caller_reaches_the_verification(make):
    """Neither fake tensors, nor vmap, inference, autocast, a default device or dtype."""
    with FakeTensorMode():
        assert make(lambda x: x + x).backend_for(CPU, 1) == "cpp"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert make(lambda x: x + x).backend_for(CPU, 1) == "cpp"
    op = make(lambda x: x + x)
    moved = torch.func.vmap(lambda x: x + op.uses_reference(x.device, x.numel()))(torch.ones(3))
    assert moved.tolist() == [1, 1, 1]


def test_a_graph_decides_while_it_is_traced(make, folder):
    kernel = counted(lambda x: x + x)
    op = make(kernel)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3] and kernel.calls == 3 + 1 and passed(kept(folder)["ops"][op.name])


def test_a_device_that_is_not_here_runs_the_reference_for_now():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    op, gpu = REGISTRY["philox"], torch.device("cuda", 0)
    assert registry.sizes_here("philox", gpu) == ({"": 0}, "shipped") and op.backend_for(gpu, 1) == "reference"
    assert not [key for key in op.chosen if key[0].type == "cuda"]  # asked again the next time


def test_the_folder_is_that_of_the_user(monkeypatch, tmp_path):
    assert records.folder() == tmp_path / "cache"
    monkeypatch.delenv("PURIFY_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert records.folder() == tmp_path / "purify_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert records.folder() == Path.home() / ".cache/purify_fast"


def test_the_smallest_size_decides_and_a_kernel_that_is_not_used_is_not_verified(make, monkeypatch):
    kernel = counted(lambda x: x + x)
    op = make(kernel)
    monkeypatch.setitem(op.smallest, "cpu", {"": 100})
    for _ in range(2):
        assert op.uses_reference(CPU, 99) and op.backend_for(CPU, 99) == "reference" and kernel.calls == 0
    for _ in range(2):
        assert not op.uses_reference(CPU, 100) and kernel.calls == 3 and op.uses_reference(CPU, 99)
    choices.forget_choices()
    monkeypatch.setitem(op.smallest, "cpu", {"": None})
    assert op.uses_reference(CPU, 10**9) and op.uses_reference(CPU, 10**9, "unknown variant")


def test_the_users_sizes_come_before_the_shipped_and_stale_ones_are_not_used(make, folder, caplog):
    op = make(lambda x: x + x)
    assert registry.sizes_here(op.name, CPU) == ({"": 0}, "shipped")
    content = {"machine": records.machine(CPU), "ops": {op.name: {"tuned": {"date": "2026-01-02"}}}}
    path = records.file_of(CPU)

    def here(sources: str, smallest: int | None) -> tuple[dict, str]:
        content["ops"][op.name]["sources"] = sources
        content["ops"][op.name]["tuned"]["smallest"] = {"": smallest}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        records._contents.clear()
        choices.forget_choices()
        return registry.sizes_here(op.name, CPU)

    mine = op.code_hash("cpu")
    assert here(mine, None) == ({"": None}, "tuned on this machine, 2026-01-02")
    assert op.backend_for(CPU, 10**9) == "reference"
    assert here(mine, 64) == ({"": 64}, "tuned on this machine, 2026-01-02")
    assert op.backend_for(CPU, 63) == "reference" and op.backend_for(CPU, 64) == "cpp"
    assert here("of another build", None) == ({"": 0}, "shipped") and not caplog.records
    path.write_text("{")
    records._contents.clear()
    choices.forget_choices()
    assert op.backend_for(CPU, 1) == "cpp" and "cannot be read" in caplog.text


def test_the_fact_of_a_run_names_kernels_and_the_users_sizes(make):
    """It changes with a tuned size and with a forced backend, and not with a kernel that has the reference's bits."""
    before = kernels_now(CPU)
    make(lambda x: x + x, exact=True)
    assert kernels_now(CPU) == before
    op = make(lambda x: x + x)
    begun = kernels_now(CPU)
    assert begun != before
    tuned = {"date": "2026-01-02", "smallest": {"": None}}
    records.update(CPU, {op.name: {"sources": op.code_hash("cpu"), "tuned": tuned}})
    choices.forget_choices()
    assert op.backend_for(CPU, 1) == "reference" and kernels_now(CPU) not in (begun, before)
    with use_backend("reference"):
        assert kernels_now(CPU) != begun
