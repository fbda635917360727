"""What ``float32`` means on a GPU: by default PyTorch rounds the operands of convolutions there to ten bits (TF32)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

#: How many blocks of `float32_products` the process is in.
_blocks = 0


def _restorer() -> Callable[[], None]:
    """What puts the settings back as they are now."""
    try:
        convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller has used PyTorch's newer settings, which the older names refuse to describe once they differ. That
        # of recurrent layers has no public name.
        names = ("conv", "rnn", "matmul")
        values = [torch._C._get_fp32_precision_getter("cuda", name) for name in names]

        def restore() -> None:
            for name, value in zip(names, values, strict=True):
                torch._C._set_fp32_precision_setter("cuda", name, value)
    else:

        def restore() -> None:
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.set_float32_matmul_precision(products)

    return restore


@contextlib.contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Within the block, compute float32 convolutions and matrix products on a GPU as the caller asks.

    The settings are the process's, so that a second thread sees them too. The CPU has none of this.

    Args:
        tf32: round the operands to ten bits of mantissa, which is several times faster; the input gradients of a small
            network then err by about 1e-2. By default products are those of IEEE float32, as on a CPU.
    """
    global _blocks
    restore = _restorer()
    _blocks += 1
    try:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        _blocks -= 1
        restore()


@contextlib.contextmanager
def whole_float32_by_default() -> Iterator[None]:
    """`float32_products`, unless the caller has chosen already by a block of it; also a decorator."""
    with contextlib.nullcontext() if _blocks else float32_products():
        yield
