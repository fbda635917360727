"""docs/performance.md is what the committed results say, and what its numbers claim."""

from benchmarks.gpu import gpu_sections
from benchmarks.pages import gpu_tables
from benchmarks.speed import limits, sheets
from benchmarks.speed.op_cases import registry
from purify_fast.ops.dispatch.examples import tensors


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


def cells(lines: list[str]) -> list[list[str]]:
    """The rows of a table, without its head."""
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]


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
