"""The benchmark runs, its reports say what its rows say, and the defaults of the ops are its committed verdict."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.speed import running, sheets, shipping, timing
from benchmarks.speed.op_cases import registry
from purify_fast import _library
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import races, records
from purify_fast.ops.dispatch.op import SIZES, Call
from purify_fast.ops.dispatch.races import SHIPPED

ROOT = Path(__file__).parents[2]

COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / sheets.ROWS
CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(not _library.loaded(), reason="the benchmark compares with the compiled extension")


def row(op: str, ratio: float | None, **more: str) -> dict:
    """One row as the CSV holds it."""
    known = {"op": op, "style": "eager", "backend": "cpp", "GB_per_s": "1", "runs": "15"}
    columns = ("variant", "shape", "dtype", "direction", "device", "threads", "torch", "triton", "date")
    times = {f"{kind}_us": "1.0" for kind in timing.CONTESTANTS}
    made = dict.fromkeys(columns, "x") | times | known | {"ratio": "" if ratio is None else f"{ratio:.3f}"}
    made["verdict"] = timing.verdict(made)
    return made | more


def test_verdicts():
    found = [timing.verdict({"ratio": r}) for r in ("1.2", "0.97", "0.95", "0.949", "")]
    assert found == ["best", "level", "level", "behind", "wrong"]
    rows = [row(op, ratio) for op, ratio in (("a", 1.5), ("a", 0.96), ("b", 2.0), ("c", 3.0), ("c", None))]
    rows.insert(3, row("b", 0.94, shape="here", style="graph"))
    decided = {line["op"]: line for line in sheets.verdicts(rows)}
    assert [decided[op]["eager_calls"] for op in "abc"] == ["cpp", "cpp", "reference"]
    assert all(line["in_graphs"] == "reference" for line in decided.values())
    assert decided["b"]["behind_eager"] == "0/1" and decided["b"]["behind_graph"] == "1/1"
    two = [row("a", 0.9, direction="backward", shape="here"), row("a", 1.5, direction="forward")]
    two = {line["direction"]: line for line in sheets.verdicts(two)}
    assert two["backward"]["eager_calls"] == "reference" and two["forward"]["eager_calls"] == "cpp"
    assert "here" in two["backward"]["worst_row"] and two["backward"]["worst_ratio"] == "0.900"
    table = sheets.markdown(rows)
    assert "| c | x | reference | reference | 1/2 | 0/0 | 1.00 |" in table and table.count("| behind |") == 1


def test_a_wrong_result_has_no_number():
    x = torch.ones(3)
    assert timing.agree((x,), (x + 1e-7,), torch.float32, "eager")
    assert not timing.agree((x,), (x + 1e-3,), torch.float32, "eager")
    assert not timing.agree((x * torch.nan,), (x,), torch.float32, "eager")
    assert not timing.agree((x, x), (x[:2], x), torch.bfloat16, "graph")


@needs_extension
def test_a_wrong_contestant_is_not_timed(monkeypatch):
    case = registry()["pgd_step"]()[0]
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
    # these have kernels on a GPU alone, which `purify-fast tune` races
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
    folder = COMMITTED.parent
    assert (folder / sheets.TABLE).read_text() == sheets.markdown(rows)


def test_what_ships_is_the_committed_verdict():
    files = ("ops.csv", shipping.FILE)
    folders = {path.parent for name in files for path in COMMITTED.parents[1].glob(f"*/{name}")}
    committed = [shipping.shipped(folder) for folder in sorted(folders)]
    assert json.loads(SHIPPED.read_text()) == committed, "run `python -m benchmarks report`"


def test_races_ship_in_place_of_rows_and_rows_fill_what_was_not_raced(tmp_path):
    """Without the facts of one machine: rows, hashes, verifications."""
    known = {"device": "D x86_64 A", "direction": "forward"}
    rows = [row("pgd_step", 3.0, variant=v, style=s, **known) for v in ("l1", "linf") for s in timing.STYLES]
    sheets.write_csv(tmp_path / sheets.ROWS, rows)
    base = shipping.shipped(tmp_path)
    assert base["ops"]["pgd_step"]["cells"]["l1"] == {"eager": "cpp", "graph": "cpp"}
    cells = {"": {"eager": "reference"}, "linf": {"eager": "reference"}, "linf float32": {"eager": "cpp"}}
    raced = {"machine": {"kind": "cpu", "device": "E"}, "date": "2026-02-03", "threads": 3}
    raced["ops"] = {"pgd_step": {"cells": cells, "sources": "x", "rows": [], "verified": {}}}
    (tmp_path / shipping.FILE).write_text(json.dumps(raced))
    made = shipping.shipped(tmp_path)
    assert made["machine"] == {"kind": "cpu", "device": "E", "threads": "3"} and made["date"] == "2026-02-03"
    assert made["ops"]["pgd_step"] == {
        "cells": {
            "": {"eager": "reference", "graph": "reference"},
            "l1": {"eager": "cpp", "graph": "cpp"},
            "linf": {"eager": "reference", "graph": "reference"},
            "linf float32": {"eager": "cpp"},
        },
    }


def test_only_races_of_this_machine_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="purify-fast tune"):
        shipping.take(CPU, tmp_path / "results")
    records.update(CPU, {"philox": {"sources": "x", "cells": {"": {"eager": "cpp"}}}}, date="2026-01-01")
    path = shipping.take(CPU, tmp_path / "results")
    assert json.loads(path.read_text())["ops"]["philox"]["cells"][""]["eager"] == "cpp"
    records.forget()


@needs_extension
@pytest.mark.parametrize("op", sorted(json.loads(SHIPPED.read_text())[0]["ops"]))
def test_defaults_are_what_ships_for_this_machine(op, tmp_path, monkeypatch):
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path))
    entry = races.nearest(records.machine(CPU))["ops"][op]
    for name, winners in entry["cells"].items():
        words = name.split()
        bits = SIZES[words.pop()] - 1 if words and words[-1] in SIZES else 0
        dtype = getattr(torch, words[-1], None) if words else None
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        for style, winner in winners.items():
            # not every processor has the instructions of every kernel
            here = winner if winner in REGISTRY[op].available["cpu"] else "reference"
            call = Call(CPU, " ".join(words[: len(words) - (dtype is not None)]), dtype, bits, style)
            assert REGISTRY[op].wanted(call).backend == here, call
