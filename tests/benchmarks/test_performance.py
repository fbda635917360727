"""The bytes that the benchmarks count for an op are those of its tensors."""

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
