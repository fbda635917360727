"""The benchmark runs, its reports say what its rows say, and the defaults of the ops follow from its committed
rows. The tests of the examples and of the counted bytes follow."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import __main__ as program
from benchmarks.gpu import every_op
from benchmarks.speed import kernel_times, running, sheets, timing
from benchmarks.speed.op_cases import registry
from purify_fast import _library
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import examples as example_tensors
from purify_fast.ops.dispatch.examples import tensors

ROOT = Path(__file__).parents[2]

COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / sheets.ROWS
MEASURED = sorted(COMMITTED.parents[1].glob(f"*/{kernel_times.ROWS}"))
needs_extension = pytest.mark.skipif(not _library.loaded(), reason="the benchmark compares with the compiled extension")


def row(op: str, ratio: float | None, **more: str) -> dict:
    """One row as the CSV holds it."""
    known = {"op": op, "style": "eager", "direction": "forward", "backend": "cpp", "GB_per_s": "1", "runs": "15"}
    columns = ("variant", "shape", "dtype", "device", "threads", "torch", "triton", "date")
    times = {f"{kind}_us": "1.0" for kind in timing.CONTESTANTS}
    made = dict.fromkeys(columns, "x") | times | known | {"ratio": "" if ratio is None else f"{ratio:.3f}"}
    made["verdict"] = timing.verdict(made)
    return made | more


def test_verdicts():
    found = [timing.verdict({"ratio": r}) for r in ("1.2", "0.97", "0.95", "0.949", "")]
    assert found == ["best", "level", "level", "behind", "wrong"]
    names = "philox", "stitch", "pgd_step"
    rows = [row(op, ratio) for op, ratio in zip([*names, *names], (1.5, 2.0, 3.0, 0.96, 1.2, None), strict=True)]
    rows.insert(3, row("stitch", 0.94, shape="here", style="graph"))
    lines = {line["op"]: line for line in sheets.verdicts(rows)}
    assert [lines[op]["behind_eager"] for op in names] == ["0/2", "0/2", "1/2"]
    assert lines["stitch"]["behind_graph"] == "1/1" and lines["philox"]["behind_graph"] == "0/0"
    assert lines["pgd_step"]["eager_calls"] == "cpp" and lines["stitch"]["in_graphs"] == "reference"
    assert lines["pgd_step"]["in_graphs"] == "cpp for l1; reference for linf, l2"
    two = [row("stitch", 0.9, direction="backward", shape="here"), row("stitch", 1.5, direction="forward")]
    two = {line["direction"]: line for line in sheets.verdicts(two)}
    assert two["backward"]["behind_eager"] == "1/1" and two["forward"]["behind_eager"] == "0/1"
    assert "here" in two["backward"]["worst_row"] and two["backward"]["worst_ratio"] == "0.900"
    table = sheets.markdown(rows)
    assert "| philox | forward | cpp | reference | 0/2 | 0/0 | 1.00 | 0.960 |" in table
    assert table.count("| behind |") == 1


def test_a_wrong_result_has_no_number():
    x = torch.ones(3)
    assert timing.agree((x,), (x + 1e-7,), torch.float32, "eager")
    assert not timing.agree((x,), (x + 1e-3,), torch.float32, "eager")
    assert not timing.agree((x * torch.nan,), (x,), torch.float32, "eager")
    assert not timing.agree((x, x), (x[:2], x), torch.bfloat16, "graph")


@needs_extension
def test_a_wrong_contestant_is_not_timed(monkeypatch):
    case = registry()["pgd_step"]()[0]
    # compiling is what takes time
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(timing, "agree", lambda actual, expected, *_: actual is expected)
    made = timing.measure("pgd_step", case, "forward", "eager", timing.QUICK)
    assert made["eager_us"] and not made["ours_us"] and not made["ratio"] and made["verdict"] == "wrong"


@pytest.mark.slow
@needs_extension
def test_quick_run_writes_rows_and_tables(tmp_path, capsys, monkeypatch):
    # compiling is what takes time
    every = registry()
    few = every | {"pgd_step": lambda: [case for case in every["pgd_step"]() if case.variant != "l1"]}
    monkeypatch.setattr(running, "registry", lambda: few)
    program.main(["ops", "pgd_step", "--quick", "--out", str(tmp_path)])
    assert "| pgd_step | forward | " in capsys.readouterr().out
    rows = sheets.read_csv(tmp_path / sheets.ROWS)
    assert {(r["variant"], r["style"]) for r in rows} == {(v, s) for v in ("linf", "l2") for s in timing.STYLES}
    for made in rows:
        assert made["verdict"] != "wrong" and made["backend"] == "cpp" and made["torch"] == torch.__version__
        assert all(float(made[f"{kind}_{n}"]) > 0 for kind in timing.CONTESTANTS for n in ("us", "p20", "p80"))
        best = min(float(made["eager_us"]), float(made["compile_us"]))
        assert math.isclose(float(made["ratio"]), best / float(made["ours_us"]), rel_tol=0.05)
    before = (tmp_path / sheets.TABLE).read_text()
    (tmp_path / sheets.TABLE).unlink()
    sheets.report(tmp_path)
    assert (tmp_path / sheets.TABLE).read_text() == before
    monkeypatch.setattr(timing, "STYLES", ("eager",))
    program.main(["ops", "reconstruction_loss", "--quick", "--out", str(tmp_path)])  # the other op's rows stay
    names = [r["op"] for r in sheets.read_csv(tmp_path / sheets.ROWS)]
    assert names.count("pgd_step") == len(rows) and names.count("reconstruction_loss") == 2


def test_every_op_with_a_kernel_is_measured():
    everything = {name for name in REGISTRY if not name.endswith("_backward")}
    # these have kernels on a GPU alone, which `python -m benchmarks kernels` times
    assert set(registry()) == everything - {"decode_samples", "square_proposal"}
    assert all(set(case.directions) <= set(case.moved) for cases in registry().values() for case in cases())


def test_committed_results_are_complete():
    rows = sheets.read_csv(COMMITTED)
    expected = {
        (op, case.variant, "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch."), direction, style)
        for op, cases in registry().items()
        for case in cases()
        for direction in case.directions
        for style in timing.STYLES
    }
    found = [tuple(r[k] for k in ("op", "variant", "shape", "dtype", "direction", "style")) for r in rows]
    assert len(found) == len(set(found)) and set(found) == expected
    assert all(int(r["runs"]) >= 15 and r["verdict"] == timing.verdict(r) for r in rows)
    assert (COMMITTED.parent / sheets.TABLE).read_text() == sheets.markdown(rows)


#: Ops and variants whose kernel has no committed times of single sizes.
UNMEASURED = {
    "cpu": {
        ("attack_loss", ""),
        *((f"diffusion_step{end}", kind) for end in ("", "_backward") for kind in ("fixed", "learned", "noiseless")),
        *(("hyperplane_projection", norm) for norm in ("linf", "l2", "l1")),
    },
    "cuda": {("attack_loss", ""), ("contextual_attention", "")},
}


@pytest.mark.parametrize("folder", MEASURED, ids=lambda it: it.parent.name)
def test_the_smallest_sizes_are_those_of_the_committed_times(folder):
    """An eager call uses a kernel in the sizes in which it takes less time, over all layouts and dtypes together."""
    kind = "cpu" if folder.parent.name == "cpu" else "cuda"
    found = kernel_times.speedups(sheets.read_csv(folder))
    backend = "cpp" if kind == "cpu" else "triton"
    served = {name: op for name, op in REGISTRY.items() if backend in op.available[kind]}
    every = {(name, example.variant) for name, op in served.items() for example in op.examples}
    assert every - found.keys() == UNMEASURED[kind] and found.keys() <= every
    for (op, variant), speedup in found.items():
        # Layouts are variants of no kernel.
        smallest = REGISTRY[op].smallest[kind][variant]
        used = {size: smallest is not None and size >= smallest for size in speedup}
        assert used == {size: ratio >= 1 for size, ratio in speedup.items()}, (op, variant, smallest, speedup)


@pytest.mark.parametrize("op", registry())
def test_a_kernel_that_is_slower_than_the_compiler_is_not_used(op):
    """Over all committed rows, a kernel that runs by default is level with the compiled reference, or faster.

    Inside graphs it takes at most half of the time.
    """
    for name, direction in ((op, "forward"), (f"{op}_backward", "backward")):
        rows = [row for row in sheets.read_csv(COMMITTED) if (row["op"], row["direction"]) == (op, direction)]
        assert bool(rows) == (name in REGISTRY)
        for measured, style in {(row["variant"], row["style"]) for row in rows}:
            # Layouts are variants of the benchmark only.
            variant = measured if measured in REGISTRY[name].smallest["cpu"] else ""
            in_graphs = variant in REGISTRY[name].in_graphs.get("cpu", ())
            used = in_graphs if style == "graph" else REGISTRY[name].smallest["cpu"][variant] is not None
            if used:
                own = [row for row in rows if (row["variant"], row["style"]) == (measured, style)]
                ours = sum(float(row["ours_us"]) for row in own)
                best = sum(min(float(row["eager_us"]), float(row["compile_us"])) for row in own)
                assert best / ours >= (2 if style == "graph" else timing.LEVEL), (name, measured, style)


# -- examples of the ops -----------------------------------------------------------------------------------------------
# Every registered op has examples for the tests on a device, and they are of use there.


def leaves(arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("op", REGISTRY)
def test_examples_of_every_op(op):
    made = REGISTRY[op].examples
    assert len(made) > 1 and len({example.name for example in made}) == len(made)
    for example in made:
        first, second = (leaves(example.make(example.dtypes[0], seed)) for seed in (0, 1))
        assert [t.shape for t in first] == [t.shape for t in second]  # a captured graph can be given the others
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", REGISTRY)
def test_tiled_samples_have_tiled_results(op):
    """The batch dimensions are found, those of passes and owners too."""
    small = REGISTRY[op].examples[0].make(torch.float32, 0)
    got = example_tensors.tensors(REGISTRY[op].reference(*example_tensors.tile(small, 2)))
    for out, wanted in zip(got, example_tensors.tensors(REGISTRY[op].reference(*small)), strict=True):
        torch.testing.assert_close(out, example_tensors.tile(wanted, 2))


def test_every_op_runs_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["every_op"])
    every_op.main()
    assert f"{len(REGISTRY)} ops" in capsys.readouterr().out


# -- bytes of the ops --------------------------------------------------------------------------------------------------
# The bytes that the benchmarks count for an op are those of its tensors.


def test_formulas_count_bytes_as_tensors_do():
    """An op that reads every input and writes every output once moves their bytes, without ids and seeds."""
    for op in ("pgd_step", "apgd_step", "gated_elu", "reconstruction_loss", "stitch", "aggregate"):
        case = registry()[op]()[0]
        inputs = case.inputs()
        outputs = tensors(case.call(*inputs))
        size = sum(t.nbytes for t in (*inputs, *outputs) if t.is_floating_point())
        if op == "stitch":  # It reads one of the passes at every pixel.
            size = 2 * outputs[0].nbytes
        assert abs(case.bytes("forward") - size) <= 0.01 * size, op
