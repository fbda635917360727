"""The entries of each public op in the tests. A new op needs three entries here, and no other table of the tests.

1. FUNCTIONS has an op's calls at its settings: tests/ops/test_contract.py checks the promises of every op with them.
2. REFUSALS has arguments that the op takes, and values that it refuses by the name of the argument.
3. A function with the name of the op draws arguments that it takes: tests/fuzz and tests/interpreter call it with them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from op_cases import decoder
from torch import Tensor

from purify_fast import ops
from purify_fast.judge.searches.square import pattern
from purify_fast.kernels.decoder_sizes import Geometry
from purify_fast.ops import REGISTRY
from purify_fast.ops.aggregate import METHODS
from purify_fast.ops.attack_loss import KINDS as LOSSES
from purify_fast.ops.decode_samples import pack
from purify_fast.ops.representation_distance import KINDS

#: The public functions, by name: each file of purify_fast/ops defines an op of its name, and functions that call it.
PUBLIC = {
    name: function
    for name in ops.__all__
    if inspect.isfunction(function := getattr(ops, name)) and function.__module__.rpartition(".")[2] in REGISTRY
}
#: Functions that FUNCTIONS need not have: the first is compared with modules of a decoder, the second has no kernel.
ELSEWHERE = ("decode_prior", "key_validity")


def public_name(op: str) -> str | None:
    """Return the name of the function that calls an op; None if purify_fast.ops exports none."""
    of_its_file = (name for name, function in PUBLIC.items() if function.__module__.endswith(f".{op}"))
    return op if op in PUBLIC else next(of_its_file, None)


@dataclass(frozen=True)
class Function:
    """A public function at one setting."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, ...]]
    # The number of first tensors that have a gradient.
    gradients: int = 0
    exact: bool = False  # every backend, layout and compiler gives the same bits
    sizes: tuple[int, ...] = (5, 8, 13)  # batches that are compiled
    batch_only: bool = False  # only the batch may change without another compilation


def images(count: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers in [0, 1] for each shape, ``count`` samples of each."""
    generator = torch.Generator().manual_seed(count)
    return [torch.rand((count, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def of(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda size, dtype=torch.float32: tuple(images(size, *shapes, dtype=dtype))


def with_stream(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The images, then a seed, another for each size, and ids."""
    stream = lambda size: (torch.tensor([size]), torch.arange(size) * 3 - 1)  # noqa: E731
    return lambda size, dtype=torch.float32: (*images(size, *shapes, dtype=dtype), *stream(size))


def features_and_keys(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    features, keys = images(size, (3, 4, 6), (6,))
    return (features - 0.5).to(dtype), keys > 0.3


def passes_and_owners(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    passes, owners = images(size, (4, 3, 8, 8), (2, 2))
    return passes.to(dtype), (4 * owners).to(torch.uint8)[None]


def logits_and_classes(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return *images(size, (10,), dtype=dtype), torch.arange(size) % 10, (3 * torch.arange(size) + 1) % 10


def images_and_numbers(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return *images(size, (3, 10, 12), (3, 10, 12), dtype=dtype), *images(size, (2, 8))


def states_and_predictions(halves: int) -> Callable[..., tuple[Tensor, ...]]:
    """The state, the prediction of so many times its channels, coefficients, a seed, ids and draws."""
    numbers = (1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0)
    return lambda size, dtype=torch.float32: (
        *images(size, IMAGE),
        *images(size, (3 * halves, 8, 8), dtype=dtype),
        torch.tensor(numbers),
        torch.tensor([size]),
        torch.arange(size) * 3 - 1,
        torch.arange(size) // 2,
    )


def denoised(*given: Tensor | str) -> Tensor:
    x, m, coefficients, seed, ids, draws, kind = given
    name = {"seed": seed, "sample_ids": ids, "draws": draws, "step": seed + 1}
    return ops.diffusion_step(2 * x - 1, 2 * m - 1, coefficients, **name, noisy=kind != "noiseless")


def proposed(x: Tensor, nat: Tensor, numbers: Tensor, norm: str) -> Tensor:
    """The proposals of each image, beside each other."""
    eps, patterns = (0.5, None) if norm == "linf" else (30.0, pattern(5, norm, torch.device("cpu")))
    found = ops.square_proposal(x, nat, eps, numbers, 5, norm, pattern=patterns)
    return found.unflatten(0, (2, -1)).transpose(0, 1)


def of_settings(
    name: str, settings: tuple, call: Callable, make: Callable, exact: tuple = (), **options
) -> dict[str, Function]:
    """A function at several settings, each of which its call gets after the tensors."""
    return {
        f"{name} {setting}": Function(
            lambda *given, setting=setting: call(*given, setting), make, exact=setting in exact, **options
        )
        for setting in settings
    }


IMAGE, STEP, NORMS, LINF = (3, 8, 8), (0.05, 0.1), ("linf", "l2", "l1"), ("linf",)
FUNCTIONS = {
    **of_settings("aggregate", METHODS[:-1], lambda x, how: ops.aggregate(6 * x - 3, how), of((8, 10)), gradients=1),
    "aggregate vote": Function(lambda x: ops.aggregate(6 * x - 3, "vote"), of((8, 10))),
    **of_settings(
        "apgd_step",
        NORMS[:2],
        lambda x, g, n, p, norm: ops.apgd_step(x, g - 0.5, n, p, *STEP, 0.75, norm),
        of(*[IMAGE] * 4),
        LINF,
    ),
    **of_settings(
        "attack_loss",
        LOSSES,
        lambda x, y, t, kind: ops.attack_loss(
            6 * x - 3, y, kind, targets=t if kind.endswith("_targeted") else None, toward=kind == "dlr"
        ),
        logits_and_classes,
    ),
    "contextual_attention": Function(
        ops.contextual_attention, features_and_keys, gradients=1, sizes=(2, 3), batch_only=True
    ),
    **of_settings("diffusion_step", ("fixed", "noiseless"), denoised, states_and_predictions(1), gradients=2),
    **of_settings("diffusion_step", ("learned",), denoised, states_and_predictions(2), gradients=2),
    "gated_elu": Function(lambda x: ops.gated_elu(6 * x - 3), of((6, 8, 10)), gradients=1),
    **of_settings(
        "hyperplane_projection",
        NORMS,
        lambda x, w, b, norm: ops.hyperplane_projection(x, w - 0.5, 4 * b.flatten() - 2, norm),
        of(IMAGE, IMAGE, ()),
    ),
    "noisy_replay": Function(
        lambda x, adv, drift, seed, ids: ops.noisy_replay(x, adv, drift, 0.5, 0.1, seed, ids),
        with_stream(IMAGE, IMAGE, ()),
        exact=True,
    ),
    **of_settings(
        "pgd_step", NORMS, lambda x, g, n, norm: ops.pgd_step(x, g - 0.5, n, *STEP, norm), of(*[IMAGE] * 3), LINF
    ),
    **of_settings(
        "philox",
        ("bits", "uniform", "normal"),
        lambda seed, ids, name: ops.philox(seed, ids, 12, stream=ops.Stream.LATENT, distribution=name, draws=3),
        with_stream(),
        ("bits", "uniform"),
    ),
    **of_settings(
        "random_transform",
        (None, 4),
        lambda x, seed, ids, passes: ops.random_transform(x, seed, ids, block=2, num_passes=passes)[0],
        with_stream(IMAGE),
        gradients=1,
    ),
    "reconstruction_loss": Function(lambda x, t: ops.reconstruction_loss(6 * x - 3, t), of(IMAGE, IMAGE), gradients=1),
    **of_settings(
        "representation_distance",
        KINDS,
        lambda a, b, c, d, kind: ops.representation_distance([2 * a - 1, b], [c, d], kind),
        of(IMAGE, (40,), IMAGE, (40,)),
        gradients=2,
    ),
    "sample_latent": Function(ops.sample_latent, with_stream((16,), (16,)), gradients=2),
    # the first size is not the edge's, which would be taken for it
    **of_settings("square_proposal", NORMS, proposed, images_and_numbers, LINF, sizes=(6, 8, 13)),
    "stitch": Function(
        lambda passes, owners: ops.stitch(passes.flatten(0, 1), owners), passes_and_owners, gradients=1, exact=True
    ),
}
#: The functions that inductor compiles, which takes seconds; all others are traced.
BY_INDUCTOR = (
    *("aggregate lse", "apgd_step linf", "diffusion_step learned", "gated_elu", "noisy_replay", "pgd_step linf"),
    *("philox uniform", "reconstruction_loss", "representation_distance abs_cosine", "sample_latent", "stitch"),
)


SEED, IDS, META = torch.tensor([5]), torch.arange(3), torch.device("meta")
ROW, PICTURE, BLOCKED = torch.zeros(3, 4), torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 64, 96)
VALID, OWNERS = torch.ones(2, 6, dtype=torch.bool), torch.zeros(1, 2, 4, 4).byte()
BALL = {
    "x": (torch.zeros(3, 5), ROW.half()),
    "x_nat": (ROW.to(META),),
    "norm": ("l3",),
    "lo": (1.5, math.nan),
    "alpha": (torch.zeros(2),),
    "eps": (-0.1, math.nan),
}
NAMED = {"seed": (7, torch.tensor(1)), "sample_ids": ([0, 1, 2], IDS.float(), IDS.to(META))}
ONE_PER_SAMPLE = {**NAMED, "sample_ids": (*NAMED["sample_ids"], torch.arange(2))}
#: By function: arguments that it takes, and values of single arguments that it refuses.
REFUSALS: dict[str, tuple[dict, dict[str, tuple]]] = {
    "aggregate": (
        {"logits": torch.zeros(3, 4, 5)},
        {"logits": (ROW, torch.zeros(3, 4, 5).long(), torch.zeros(3, 0, 5), torch.zeros(3, 4, 1))},
    ),
    "attack_loss": (
        {"logits": ROW, "labels": IDS},
        {
            "logits": (ROW.long(), ROW[:, :1], ROW[0], ROW.to(META)),
            "labels": (IDS[:2], IDS.float(), IDS[:, None], IDS.to(META)),
            "kind": ("dlr_untargeted",),
            "targets": (IDS,),
        },
    ),
    "pgd_step": ({"x": ROW, "grad": ROW, "x_nat": ROW, "alpha": 0.1, "eps": 0.1}, {**BALL, "density": (0.0, math.nan)}),
    "apgd_step": (
        {"x": ROW, "grad": ROW, "x_nat": ROW, "previous": ROW, "alpha": 0.1, "eps": 0.1},
        {**BALL, "previous": (torch.zeros(3, 5),), "norm": ("l1",), "momentum": (1.5, math.nan)},
    ),
    "contextual_attention": (
        {"features": torch.zeros(2, 3, 4, 6), "valid": VALID},
        {"features": (torch.zeros(2, 3, 4, 4).int(), torch.zeros(2, 3, 5, 4)), "valid": (VALID[:, :5], VALID.to(META))},
    ),
    "decode_prior": (
        {**decoder(), "samples": 3},
        {
            "packed": (torch.zeros(9, dtype=torch.float16), torch.zeros(9)),
            "biases": (torch.zeros(1), decoder()["biases"].double()),
            "condition": (torch.zeros(2, 23), decoder()["condition"].half(), decoder()["condition"].to(META)),
            "dtype": (torch.float16,),
            "seed": (7, torch.zeros(0, dtype=torch.int64)),
            "sample_ids": (torch.arange(3),),
            "samples": (-1,),
        },
    ),
    "diffusion_step": (
        {
            **{"x": ROW, "prediction": ROW, "coefficients": torch.zeros(8)},
            **{"seed": SEED, "sample_ids": IDS, "draws": IDS, "step": SEED},
        },
        {
            **ONE_PER_SAMPLE,
            "x": (ROW.half(),),
            "prediction": (torch.zeros(3, 5), ROW.double()),
            "coefficients": (torch.zeros(6), torch.zeros(8).double(), torch.zeros(8, device=META)),
            "draws": (IDS[:2],),
            "step": (IDS, None),
        },
    ),
    "gated_elu": ({"features": ROW}, {"features": (ROW.byte(), torch.zeros(3, 5, 4, 4))}),
    "hyperplane_projection": (
        {"x": ROW, "w": ROW, "b": 0.0},
        {"w": (torch.zeros(3, 5), ROW.half(), ROW.to(META)), "b": (torch.zeros(2),), "norm": ("l3",), "lo": (1.5,)},
    ),
    "key_validity": (
        {"mask": torch.zeros(2, 1, 8, 8), "size": (2, 2)},
        {"mask": (torch.zeros(2, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 0, 8)), "size": ((0, 2), (2, -1))},
    ),
    "noisy_replay": (
        {"x": ROW, "x_adv": ROW, "drift": ROW[:, 0], "tau": 0.1, "eps": 0.1, "seed": SEED, "sample_ids": IDS},
        {
            **ONE_PER_SAMPLE,
            "x": (torch.zeros(3, 5),),
            "x_adv": (ROW.half(),),
            "drift": (torch.zeros(2), ROW[:, 0].to(META)),
            "tau": (torch.zeros(3),),
            "eps": (torch.zeros(3, 1),),
            "hi": (math.nan,),
        },
    ),
    "philox": (
        {"seed": SEED, "sample_ids": IDS, "numel": 3, "stream": ops.Stream.MASK},
        {**NAMED, "numel": (-1,), "draws": (0,), "first_draw": (-2,)},
    ),
    "random_transform": (
        {"x": BLOCKED, "seed": SEED, "sample_ids": IDS},
        {
            **ONE_PER_SAMPLE,
            "x": (BLOCKED.byte(), BLOCKED.to(META)),
            "block": (0, 64),
            "sigma": (-0.1, math.inf, math.nan),
            "mask_ratio": (1.0, -0.1, math.nan),
            "num_passes": (0, 4, 7),
            "samples": (0,),
            "dtype": (torch.int8,),
        },
    ),
    "reconstruction_loss": (
        {"logits": ROW, "target": ROW},
        {"target": (torch.zeros(3, 5), ROW.byte(), ROW.to(META)), "logits": (torch.zeros(2, 5, 4),)},
    ),
    "representation_distance": (
        {"student": ROW, "teacher": ROW},
        {"teacher": (torch.zeros(3, 5), ROW.byte(), ROW.to(META))},
    ),
    "sample_latent": (
        {"mu": ROW, "logvar": ROW, "seed": SEED, "sample_ids": IDS},
        {**ONE_PER_SAMPLE, "mu": (torch.zeros(3, 5),), "logvar": (ROW.half(), ROW.to(META))},
    ),
    "square_proposal": (
        {"x": PICTURE, "x_nat": PICTURE, "eps": 0.1, "numbers": torch.zeros(2, 1, 8), "edge": 3},
        {
            "x_nat": (torch.zeros(2, 3, 8, 9),),
            "numbers": (torch.zeros(2, 8), torch.zeros(2, 1, 8).double(), torch.zeros(2, 1, 8, device=META)),
            "edge": (9, torch.tensor(5.0), torch.tensor([5])),
            "norm": ("l3",),
            "lo": (1.5,),
            "eps": (torch.zeros(3),),
        },
    ),
    "stitch": (
        {"images": torch.zeros(6, 3, 8, 8), "owners": OWNERS},
        {
            "images": (torch.zeros(0, 3, 8, 8),),
            "owners": (OWNERS.float(), OWNERS.to(META), OWNERS[:, :, :3], OWNERS.repeat(1, 2, 1, 1)),
        },
    ),
}
#: By function: values of several arguments that it refuses together.
TOGETHER: dict[str, list[dict]] = {
    "pgd_step": [dict.fromkeys(("x", "grad", "x_nat"), torch.zeros(3))],
    "apgd_step": [{"eps": torch.zeros(3, 1)}],
    "attack_loss": [
        {"kind": "margin_targeted"},
        {"kind": "dlr", "logits": ROW[:, :2]},
        {"kind": "dlr_targeted", "logits": ROW[:, :3], "targets": IDS},
        {"kind": "dlr_targeted", "targets": IDS[:2]},
    ],
    "random_transform": [{"block": 2, "num_passes": 256}],
    "reconstruction_loss": [{"logits": IDS.float(), "target": IDS.float()}],
    "representation_distance": [
        {"student": IDS.float(), "teacher": IDS.float()},
        {"student": [ROW, ROW.to(META)], "teacher": [ROW, ROW.to(META)]},
        {"student": [ROW], "teacher": [ROW, ROW]},
        {"student": [ROW, ROW[:2]], "teacher": [ROW, ROW[:2]]},
    ],
    "sample_latent": [{"sample_ids": IDS, "mu": torch.zeros(3, 4, 2), "logvar": torch.zeros(3, 4, 2)}],
    "square_proposal": [
        {"norm": "l2", "pattern": None},
        {"norm": "l1", "pattern": torch.zeros(2, 9)},
        {"norm": "l1", "pattern": torch.zeros(2, 3, 3, device=META)},
    ],
}


FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(draw, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(dtype)


def uniform(draw, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(dtype)


def stream(draw, batch: int) -> dict:
    return {"seed": torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))]), "sample_ids": torch.arange(batch) - 1}


def image_shape(draw) -> tuple[int, ...]:
    sizes = st.integers(1, 9)
    return draw(st.one_of(st.tuples(sizes), st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes)))


def aggregate(draw) -> dict:
    shape = (draw(st.integers(0, 5)), draw(st.integers(1, 9)), draw(st.integers(2, 12)))
    method = draw(st.sampled_from(METHODS))
    return {"logits": 3 * normal(draw, *shape, dtype=draw(st.sampled_from(FLOATS))), "method": method}


def attack_loss(draw) -> dict:
    batch, classes, kind = draw(st.integers(0, 5)), draw(st.integers(4, 12)), draw(st.sampled_from(LOSSES))
    labels = torch.arange(batch) % classes
    logits = 3 * normal(draw, batch, classes, dtype=draw(st.sampled_from(FLOATS)))
    targets = (labels + 1) % classes if kind.endswith("_targeted") else None
    return {"logits": logits, "labels": labels, "kind": kind, "targets": targets, "toward": draw(st.booleans())}


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
    student, teacher = ([normal(draw, *shape, dtype=dtype) for shape in shapes] for _ in range(2))
    return {"student": student, "teacher": teacher, "kind": draw(st.sampled_from(KINDS))}


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
