"""Every public op with arguments of any kind: the definition's result, or a refusal that names an argument."""

import re

import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st
from mangling import CONTEXTS, fuzzed, mangled, named, names_of, on_meta, ordinary, tensors
from torch import Tensor

from purify_fast import _library, ops
from purify_fast.kernels.decoder_sizes import Geometry
from purify_fast.ops.decode_samples import pack

pytestmark = pytest.mark.usefixtures("one_thread")
NO_MEMORY = re.compile("can't allocate memory|storage size calculation overflowed|bad_alloc|invalid shape")
FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(draw, *shape: int, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return torch.randn(shape, generator=generator).to(dtype)


def uniform(draw, *shape: int, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return torch.rand(shape, generator=generator).to(dtype)


def stream(draw, batch: int) -> dict:
    return {"seed": torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))]), "sample_ids": torch.arange(batch) - 1}


def image_shape(draw) -> tuple[int, ...]:
    sizes = st.integers(1, 9)
    return draw(st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes)))


def aggregate(draw) -> dict:
    shape = (draw(st.integers(0, 5)), draw(st.integers(1, 9)), draw(st.integers(2, 12)))
    method = draw(st.sampled_from(ops.aggregate.__globals__["METHODS"]))
    return {"logits": 3 * normal(draw, *shape, dtype=draw(st.sampled_from(FLOATS))), "method": method}


def step(draw) -> dict:
    dtype, batch = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 4))
    shape = (batch, *image_shape(draw))
    clean = uniform(draw, *shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    radius = draw(st.sampled_from([0.1, 0.0, 2.0, torch.linspace(0.0, 0.5, max(batch, 1))[:batch].to(wide)]))
    given = {"x": (clean + 0.05).clamp(0, 1), "grad": normal(draw, *shape, dtype=dtype), "x_nat": clean}
    return {**given, "alpha": 0.05, "eps": radius, "norm": "linf", "lo": 0.0, "hi": 1.0}


def pgd_step(draw) -> dict:
    return {**step(draw), "norm": draw(st.sampled_from(["linf", "l2", "l1"])), "density": 0.3}


def apgd_step(draw) -> dict:
    made = step(draw)
    return {**made, "previous": made["x_nat"].clone(), "momentum": 0.75, "norm": draw(st.sampled_from(["linf", "l2"]))}


def square_proposal(draw) -> dict:
    batch, channels, edge, draws = (draw(st.integers(least, 3)) for least in (0, 1, 1, 1))
    shape = (batch, channels, draw(st.integers(edge, 9)), draw(st.integers(edge, 9)))
    dtype, norm = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(["linf", "l2", "l1"]))
    clean = uniform(draw, *shape, dtype=dtype)
    pattern = None if norm == "linf" else normal(draw, 2, edge, edge)
    made = {"x": (clean + 0.05).clamp(0, 1), "x_nat": clean, "eps": draw(st.sampled_from([0.5, 4.0]))}
    made["numbers"] = uniform(draw, batch, draws, 5 + channels)
    return {**made, "edge": edge, "norm": norm, "lo": 0.0, "hi": 1.0, "pattern": pattern}


def hyperplane_projection(draw) -> dict:
    dtype, batch = draw(st.sampled_from(FLOATS)), draw(st.integers(0, 4))
    shape = (batch, *image_shape(draw))
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": uniform(draw, *shape, dtype=dtype),
        "w": normal(draw, *shape, dtype=dtype),
        "b": draw(st.sampled_from([0.3, -50.0, torch.linspace(-1.0, 1.0, max(batch, 1))[:batch].to(wide)])),
        "norm": draw(st.sampled_from(["linf", "l2", "l1"])),
        "lo": 0.0,
        "hi": 1.0,
    }


def noisy_replay(draw) -> dict:
    batch, dtype = draw(st.integers(0, 4)), draw(st.sampled_from(FLOATS))
    shape = (batch, *image_shape(draw))
    made = {"x": uniform(draw, *shape, dtype=dtype), "x_adv": uniform(draw, *shape, dtype=dtype)}
    made["drift"] = uniform(draw, batch, dtype=torch.promote_types(dtype, torch.float32))
    return {**made, "tau": 0.5, "eps": 0.1, **stream(draw, batch), "lo": 0.0, "hi": 1.0}


def philox(draw) -> dict:
    made = {**stream(draw, draw(st.integers(0, 4))), "numel": draw(st.integers(0, 20)), "stream": ops.Stream.LATENT}
    return {**made, "distribution": draw(st.sampled_from(["uniform", "normal"])), "draws": 2, "first_draw": 0}


def random_transform(draw) -> dict:
    block, rows, columns = (draw(st.integers(1, 4)) for _ in range(3))
    batch, channels, dtype = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(FLOATS))
    x = uniform(draw, batch, channels, block * rows, block * columns, dtype=dtype)
    made = {"x": x, **stream(draw, batch), "sigma": 0.25, "block": block, "mask_ratio": 0.3, "samples": 2}
    return {**made, "shared_mask": False, "channels_last": draw(st.booleans())}


def stitch(draw) -> dict:
    passes, samples, batch = (draw(st.integers(1, 3)) for _ in range(3))
    rows, columns, block = (draw(st.integers(1, 3)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    owners = torch.randint(0, passes + 1, (samples, batch, rows, columns), generator=generator, dtype=torch.uint8)
    shape, dtype = (samples * batch * passes, 2, rows * block, columns * block), draw(st.sampled_from(FLOATS))
    return {"images": normal(draw, *shape, dtype=dtype), "owners": owners}


def diffusion_step(draw) -> dict:
    shape, dtype = (draw(st.integers(0, 4)), *image_shape(draw)), draw(st.sampled_from(FLOATS))
    inner, halves = torch.promote_types(dtype, torch.float32), draw(st.integers(1, 2))
    rows = draw(st.sampled_from([(), shape[:1]]))
    values = torch.tensor([1.25, -0.75, 1.0, 0.4, 0.6, draw(st.sampled_from([0.3, 0.0])), -4.0, -2.0], dtype=inner)
    return {
        "x": normal(draw, *shape, dtype=inner),
        "prediction": normal(draw, shape[0], halves * shape[1], *shape[2:], dtype=dtype),
        "coefficients": values.repeat(*rows, 1) if rows else values,
        **stream(draw, shape[0]),
        "draws": torch.arange(shape[0]) // 2,
        "step": torch.tensor([draw(st.integers(0, 2**16 - 1))]),
        "noisy": draw(st.booleans()),
    }


def gated_elu(draw) -> dict:
    shape = (draw(st.integers(0, 3)), 2 * draw(st.integers(1, 4)), *image_shape(draw)[:2])
    return {"features": normal(draw, *shape, dtype=draw(st.sampled_from(FLOATS)))}


def reconstruction_loss(draw) -> dict:
    shape, dtype = (draw(st.integers(0, 4)), *image_shape(draw)), draw(st.sampled_from(FLOATS))
    return {"logits": 3 * normal(draw, *shape, dtype=dtype), "target": uniform(draw, *shape, dtype=dtype)}


def sample_latent(draw) -> dict:
    batch, size = draw(st.integers(0, 4)), draw(st.integers(1, 30))
    dtype = draw(st.sampled_from(FLOATS))
    parts = {name: normal(draw, batch, size, dtype=dtype) for name in ("mu", "logvar")}
    return {**parts, **stream(draw, batch)}


def representation_distance(draw) -> dict:
    batch, count = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    shapes = [(batch, *image_shape(draw)) for _ in range(count)]
    dtype = draw(st.sampled_from(FLOATS))
    kinds = ops.representation_distance.__globals__["KINDS"]
    student, teacher = ([normal(draw, *shape, dtype=dtype) for shape in shapes] for _ in range(2))
    return {"student": student, "teacher": teacher, "kind": draw(st.sampled_from(kinds))}


def contextual_attention(draw) -> dict:
    batch, height, width = draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    features = normal(draw, batch, draw(st.integers(1, 4)), 2 * height, 2 * width, dtype=draw(st.sampled_from(FLOATS)))
    return {"features": features, "valid": uniform(draw, batch, height * width) > 0.4, "scale": 10.0}


def key_validity(draw) -> dict:
    mask = uniform(draw, draw(st.integers(0, 2)), 1, draw(st.integers(1, 9)), draw(st.integers(1, 9))) > 0.7
    return {"mask": mask.float(), "size": (draw(st.integers(1, 4)), draw(st.integers(1, 4)))}


def decode_prior(draw) -> dict:
    sizes, batch = Geometry.of([6, 4, 2, 2, 3, 3, 2, 1, 3, 3]), draw(st.integers(0, 3))
    first = normal(draw, *sizes.start, sizes.latent_dim)
    packed, biases = pack(first, [normal(draw, sizes.start[0], 3, 3, 3)], [normal(draw, 3)])
    size = sizes.start[0] * sizes.start[1] * sizes.start[2]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    given = {"condition": normal(draw, batch, size), **stream(draw, batch), "packed": packed.to(dtype)}
    settings = {"geometry": sizes, "samples": 2, "slope": 0.2, "squash": draw(st.booleans())}
    return {**given, "biases": biases.float(), **settings}


OPS = {name: (getattr(ops, name), make) for name, make in list(globals().items()) if name in ops.__all__}


def test_no_op_is_left_out():
    # each op has a file of its name
    found = {name for name in ops.__all__ if getattr(getattr(ops, name), "__module__", "").endswith(f".{name}")}
    assert found <= OPS.keys() and len(OPS) == 17 and len(found) >= 13


def called(op, arguments: dict):
    """The results of an op, or its refusal."""
    try:
        return op(**arguments), None
    except (ValueError, TypeError) as error:
        return None, error
    except RuntimeError as error:
        # more than any machine has is refused by PyTorch's allocator, which knows no arguments
        if NO_MEMORY.search(str(error)) is None:
            raise
        reject()


def unchanged(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before) or bool(((now == before) | ((now != now) & (before != before))).all())


def same(found, wanted, rounding: bool) -> None:
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        if one.is_meta or not rounding:
            continue
        loose = one.dtype in (torch.bfloat16, torch.float16)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if loose else {"rtol": 2e-4, "atol": 2e-4}
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("name", OPS)
@fuzzed
def test_an_op(name, data):
    op, make = OPS[name]
    arguments, done = mangled(data.draw, make(data.draw), data.draw(st.sampled_from([0, 1, 1, 2])))
    if data.draw(st.integers(0, 11)) == 11:
        arguments = {key: on_meta(value) for key, value in arguments.items()}
        done.append("all: meta")
    context = data.draw(st.sampled_from(sorted(CONTEXTS)))
    with CONTEXTS[context]():
        before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
        found, refused = called(op, arguments)
        if refused is not None:
            assert named(refused, names_of(op)), (done, context, refused)
            assert done, (refused, arguments)
            return
        for key, value in before.items():
            assert value.is_meta or unchanged(arguments[key], value), key
        if _library.loaded():
            with ops.use_backend("reference"):
                wanted, refused = called(op, arguments)
            assert refused is None, (done, context, refused)
            same(found, wanted, ordinary(arguments) and context != "autocast")
