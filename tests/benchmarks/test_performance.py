"""docs/performance.md is what the committed results say, and what its numbers claim."""

from pathlib import Path

from benchmarks.gpu import gpu_sections
from benchmarks.pages import fill, gpu_tables, performance
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
    assert "## Measured: Some GPU" in page
    assert "| Some GPU | 1,000 | 200,000 | 2026-01-01, torch 2.11.0, triton 3.6.0 |" in page
    assert "[ops](../benchmarks/results/some-gpu/ops.md)." in page
    assert all(f"| {row['op']} | {row['direction']} | 1/1 | 0.900 |" in page for row in rows)


H200 = RESULTS / "nvidia-h200"


def cells(lines: list[str]) -> list[list[str]]:
    """The rows of a table, without its head."""
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]


def test_the_page_has_every_table_of_the_h200():
    tables = gpu_tables.tables(H200)
    assert {name: len(cells(lines)) for name, lines in tables.items()} == {
        "verdicts": 0,
        "captures": 6,
        "evaluations": 12,
        "pgd": 8,
        "behind": 4,
    }
    page = PAGE.read_text()
    assert all(line in page for lines in tables.values() for line in lines if line.startswith("|"))
    assert cells(tables["evaluations"])[-1] == ["all attacks", "35.37", "18.42", "1.92", "318", "0"]
    assert "In 862 of 902 measurements, the kernel was faster." in " ".join(page.split())
    assert all(f"`{pipeline}`: NVIDIA H200, 16 threads." in page for pipeline in ("carso_training", "arrest_step"))


def test_losses_of_the_h200_are_said():
    said = gpu_tables.pgd(H200)[-1]
    assert said.startswith("**The fastest form is not ours:**") and "is 1.32 times as fast as our fastest form." in said
    lost = {(op, case): times for op, case, *times in cells(gpu_tables.behind(H200))}
    assert lost["aggregate", "mean float32 large"] == ["267 / 43 (0.16)", "255 / 42 (0.16)"]
    assert ("gated_elu", "float32 medium") not in lost  # only starting the kernel takes longer
    assert ("aggregate", "vote float32 medium") not in lost  # 4 % slower, which is level


def test_a_wrong_kernel_and_a_form_that_wins_are_said(tmp_path):
    """And where an evaluation was not finished, there is no speedup."""
    verdict = {"op": "stitch", "error": "2.0", "budget": "1.0", "case": "here", "passed": "False"}
    kernels = [verdict, {**verdict, "budget": "0.0"}, {**verdict, "op": "philox", "passed": "True"}]
    sheets.write_csv(tmp_path / gpu_sections.VERDICTS, kernels)
    told = ["stitch", "2.0e+00"]
    wrong = [[*told, "1.0e+00", "200 %", "here"], [*told, "0.0e+00", "-", "here"]]
    assert cells(gpu_tables.verdicts(tmp_path)) == wrong
    sheets.write_csv(tmp_path / limits.FILE, [{"limit": limits.PRODUCT, "median": "1000.0", "device": "G"}])
    forms = {"plain": "4.0", "expert, torch.compile": "3.0", "ours": "2.0"}
    rows = [{"form": form, "ms": ms, "images_per_s": "1", "TFLOP_per_s": "0.25"} for form, ms in forms.items()]
    sheets.write_csv(tmp_path / gpu_tables.PGD, [{**row, "device": "G"} for row in rows])
    *lines, said = gpu_tables.pgd(tmp_path)
    assert said == "The fastest form is one of this package."
    assert [row[-2:] for row in cells(lines)] == [["25 %", "0.50"], ["25 %", "0.67"], ["25 %", "1.00"]]
    (tmp_path / limits.FILE).unlink()
    assert {row[-2] for row in cells(gpu_tables.pgd(tmp_path))} == {"-"}
    row = {"part": gpu_tables.OFF, "attack": "clean", "seconds": "2.0", "robust": "5", "other_than_off": "0"}
    auto = {**row, "part": gpu_tables.AUTO, "seconds": "1.0", "other_than_off": "3"}
    sheets.write_csv(tmp_path / gpu_sections.STANDARD, [row, {**row, "attack": "PGD"}, auto])
    evaluated = [["clean", "2.00", "1.00", "2.00", "5", "3"], ["PGD", "2.00", "-", "-", "5", "0"]]
    assert cells(gpu_tables.evaluations(tmp_path)) == evaluated
    assert gpu_tables.tables(tmp_path)["captures"] == []


def test_ratios_of_pipelines_are_against_the_faster_expert_where_there_is_one(tmp_path):
    row = {"pipeline": "p", "case": "c", "shape": "8 images", "peak_MB": "", "share_of_matrix_rate": "0.5"}
    row |= {"p20": "1", "p80": "1", "GFLOP": "1", "matrix_GFLOP_per_s": "1", "runs": "5", "device": "D"}
    row |= {"threads": "2", "torch": "2", "triton": "", "date": "2026-01-01", "verdict": "right"}
    forms = {"plain": (400, 1), "expert": (100, 4), "expert, compiled": (80, 5), "ours": (50, 8)}
    rows = [row | {"contestant": name, "ms": str(ms), "speed_up": f"{by:.2f}"} for name, (ms, by) in forms.items()]
    for some, base, last in (
        (rows, "relative to the expert's faster form", "1.60"),
        (rows[::3], "over the plain", "8.00"),
    ):
        sheets.write_csv(tmp_path / sheets.PIPELINES, some)
        lines = performance.pipelines(tmp_path, "p")
        assert base in lines[0] and cells(lines)[-1] == ["**purify_fast**", f"50 ({last})"]
        page = sheets.pipelines_markdown(some)
        assert ("| times the faster expert |" in page) == (len(some) == 4)
        assert ("| ours | 50 | 1 - 1 | 5 | 1.60 | 8.00 | 0.5 |" in page) == (len(some) == 4)


def test_tables_show_the_fewest_threads_and_one_table_shows_all_races(tmp_path):
    row = {"pipeline": "p", "shape": "8 images", "peak_MB": "", "share_of_matrix_rate": "0.5", "speed_up": "1.00"}
    row |= {"device": "D", "p80": "9"}
    each = [("c", "1", 90, 40), ("c", "2", 60, 50), ("d", "2", 30, 20)]
    rows = [
        row | {"case": case, "threads": threads, "contestant": name, "ms": str(ms), "p20": str(ms - 10)}
        for case, threads, *times in each
        for name, ms in zip(("expert", "ours"), times, strict=True)
    ]
    sheets.write_csv(tmp_path / sheets.PIPELINES, rows)
    assert cells(performance.pipelines(tmp_path, "p"))[-1] == ["**purify_fast**", "40 (2.25)", "20 (1.50)"]
    machine, _, *lines = performance.expert_table(tmp_path)
    assert machine == "D, 1 thread; D, 2 threads."
    assert cells(lines) == [
        ["p: c", "1", "90", "40", "2.67", "2.25"],
        ["p: c", "2", "60", "50", "1.25", "1.20"],
        ["p: d", "2", "30", "20", "2.00", "1.50"],
    ]
