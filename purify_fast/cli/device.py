"""The device that a command computes on."""

from __future__ import annotations


def usable_device(name: str) -> str:
    """The device to use.

    Args:
        name: the option's value: "auto" or a device as PyTorch names it.

    Returns:
        "cuda" or "cpu" for "auto"; any other name as it is.

    Raises:
        ValueError: no such device, or none on this machine.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        why = "there is no GPU, or no driver for it" if torch.version.cuda else "this build of PyTorch is for CPUs"
        raise ValueError(f"--device {name}: PyTorch finds no GPU here ({why}); use --device cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: this machine has none: {str(error).splitlines()[0]}") from error
    return name
