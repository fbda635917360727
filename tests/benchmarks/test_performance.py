"""docs/performance.md is what the committed results say, and what its numbers claim."""

from pathlib import Path

from benchmarks.pages import fill, performance
from benchmarks.speed import limits, sheets, timing
from benchmarks.speed.ops import registry
from purify_fast.ops.dispatch.examples import tensors

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
TABLES = ("performance_devices", "measured")


def test_every_op_that_loses_has_its_line():
    page = PAGE.read_text()
    for line in sheets.verdicts(sheets.read_csv(RESULTS / "cpu" / sheets.ROWS)):
        lost = f"| {line['op']} | {line['direction']} | {line['behind_eager']} | {line['worst_ratio']} |"
        assert (lost in page) == (line["eager_calls"] == "reference")


def test_formulas_count_bytes_as_tensors_do():
    """Of ops that read every input and write every output once: the sizes of these tensors, ids and seeds aside."""
    for op in ("pgd_step", "apgd_step", "gated_elu", "reconstruction_loss", "stitch", "aggregate"):
        case = registry()[op]()[0]
        inputs = case.inputs()
        outputs = tensors(case.call(*inputs))
        size = sum(t.nbytes for t in (*inputs, *outputs) if t.is_floating_point())
        if op == "stitch":  # of the passes, one is read at every pixel
            size = 2 * outputs[0].nbytes
        assert abs(case.bytes("forward") - size) <= 0.01 * size, op


def test_a_gpus_folder_becomes_a_chapter(tmp_path):
    """Rows as the check of a GPU writes them."""
    rows = []
    for op, cases in registry("cuda").items():
        case = cases()[0]
        for direction in case.directions:
            row = {"op": op, **case.named, "direction": direction, "style": "eager", "backend": "triton"}
            row |= {f"{kind}_us": "500.00" for kind in timing.CONTESTANTS} | {"ratio": "0.900", "verdict": "behind"}
            row |= {"GB_per_s": "900", "runs": "15", "device": "Some GPU", "threads": "1"}
            rows.append(row | {"torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-01"})
    sheets.write_csv(tmp_path / "some-gpu" / sheets.ROWS, rows)
    rates = {"unit": "GB/s", "device": "Some GPU"}
    measured = [{"limit": limits.COPY, "median": "1000.0"}, {"limit": limits.PRODUCT, "median": "200000.0"}]
    sheets.write_csv(tmp_path / "some-gpu" / limits.FILE, [one | rates for one in measured])
    page, _ = fill.filled("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in TABLES), tmp_path)
    assert performance.NOT_RUN not in page and "## Measured: some-gpu" in page
    assert "| Some GPU | 1,000 | 200,000 | 2026-01-01, torch 2.11.0, triton 3.6.0 |" in page
    assert "[ops](../benchmarks/results/some-gpu/ops.md)." in page
    assert all(f"| {row['op']} | {row['direction']} | 1/1 | 0.900 |" in page for row in rows)
