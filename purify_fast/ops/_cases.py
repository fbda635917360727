"""Which examples stand for a kernel on a GPU, where each dtype and each setting is compiled for itself.

All examples verify a CPU's kernel, which is compiled already. A GPU's is compiled for every dtype and setting that it
is called with, at a third of a second each. So a call there waits for the examples of its own variant and dtype alone.
What verifies a whole op takes those of the table: every op in each of its dtypes; every kernel in float32 and in one of
two bytes; every setting, layout and width of a thread's accesses in one dtype at least.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from ._examples import Example, of

_DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
_DTYPES_OF = {dtype: letter for letter, dtype in _DTYPES.items()}
_STEPS = {"linf 3x16400": "f", "linf 3x3x33x31": "h", "l2 3x16400": "fb"}
_WHOLE = {"l2 3x3x33x31": "f", "l2 3x1x16x16": "b", "l1 3x16400": "fb", "l1 3x3x33x31": "f", "l1 3x1x16x16": "b"}
_ROWS = {"3x16400": "fb", "3x3x33x31": "h"}
_TRANSFORMED = {
    "block 4 0 passes 1 draws noise 0.25 3x3x32x32": "f",
    "block 4 0 passes 1 draws noise 0.25 channels_last 3x3x32x32": "b",
    "block 3 5 passes 1 draws noise 0.25 channels_last 3x2x9x15": "f",
    "block 8 3 passes 1 draws noise 0.25 3x1x16x24": "b",
    "block 4 0 passes 2 draws noise 0 3x1x16x16": "h",
}
_STITCHED = {"4 passes 3x3x32x32": "f", "4 passes channels_last 3x3x32x32": "b", "3 passes 3x2x9x15": "h"}
_GATED = {"dim 3 3x8x8x48": "f", "dim 1 3x2050": "b", "dim 3 3x5x7x14": "h"}
_LATENT = {"3x64": "fb", "3x37": "h"}
_ATTENDED = {"8x8x6": "fb", "4x7x3": "h"}
#: By op, the names of examples with the dtypes that stand for it; a name may be a pattern.
REPRESENTATIVES: dict[str, dict[str, str]] = {
    "philox": {"normal 3x3x1024": "f", "uniform 3x3x130": "f", "bits 3x3x130": "f"},
    "aggregate": {"lse 3x8x10": "f", "mean 3x8x10": "b", "mean_sigmoid 3x8x10": "f", "peel *3x8x1[02]": "fb",
                  "vote 3x8x10": "fh"},
    "aggregate_backward": {"lse 3x8x10": "f", "mean 3x8x10": "b", "mean_sigmoid 3x8x10": "f", "peel 3x8x10": "fh",
                           "peel scale 60 3x8x12": "f", "vote 3x8x10": "f"},
    "pgd_step": _STEPS | _WHOLE,
    "hyperplane_projection": {"linf 3x16400": "f", "l2 3x3x33x31": "b", "l1 3x16400": "f", "l1 3x3x33x31": "h"},
    "square_proposal": {"linf 1 proposals edge 7 3x3x32x32": "f", "linf 2 proposals edge 3 3x2x9x15": "h",
                        "l2 1 proposals edge 7 3x3x32x32": "f", "l1 2 proposals edge 3 3x2x9x15": "b"},
    "apgd_step": _STEPS,
    "noisy_replay": _ROWS,
    "reconstruction_loss": _ROWS,
    "reconstruction_loss_backward": _ROWS,
    "random_transform": _TRANSFORMED,
    "random_transform_backward": _TRANSFORMED,
    "stitch": _STITCHED,
    "stitch_backward": _STITCHED,
    "gated_elu": _GATED,
    "gated_elu_backward": _GATED,
    "sample_latent": _LATENT,
    "sample_latent_backward": _LATENT,
    "contextual_attention": _ATTENDED,
    "contextual_attention_backward": _ATTENDED,
    "representation_distance": {"[!l]* 1 layers": "f", "l2 1 layers": "b", "abs_cosine 2 layers": "bh",
                                "l2 2 layers": "f"},
    "representation_distance_backward": {"abs_cosine 1 layers": "f", "l2 2 layers": "b", "angular 3 layers": "h"},
    "decode_samples": {"K 3 2 layers squashed 40x3x3": "f", "K 3 2 layers channels_last 40x3x3": "b",
                       "K 2 2 layers squashed 40x3x3": "f", "K 2 2 layers channels_last 40x3x3": "b",
                       "K 2 1 layers float32 squashed 40x3x3": "f"},
    "decode_samples_backward": {"K 3 2 layers squashed 40x3x3": "f", "K 2 1 layers float32 40x3x3": "fb"},
}  # fmt: skip


def _letters(op: str, example: Example) -> str:
    """The dtypes in which an example stands for an op; all of them where the op is not in the table."""
    table = REPRESENTATIVES.get(op)
    if table is None:
        return "".join(_DTYPES)
    return "".join(of_these for pattern, of_these in table.items() if fnmatchcase(example.name, pattern))


def cases(op: str, kind: str, variant: str = "", dtype: torch.dtype | None = None) -> list[tuple[Example, torch.dtype]]:
    """What a kernel is verified with: examples, each with a dtype.

    Args:
        op: its name.
        kind: the type of the device.
        variant: of the calls that it is to serve on a GPU.
        dtype: of those calls; None: the cases stand for all calls of the op.
    """
    every = [(example, own) for example in of(op) for own in example.dtypes]
    if kind == "cpu":
        return every
    chosen = [case for case in every if _DTYPES_OF[case[1]] in _letters(op, case[0])]
    if dtype is None:
        return chosen
    stand = [example.name for example, _ in chosen]
    own = [(example, one) for example, one in every if example.name in stand and one == dtype]
    # an op that has no examples of its variants is verified with all of them
    return [case for case in own if case[0].variant == variant] or own or chosen
