"""AutoAttack (Croce & Hein, ICML 2020) from the package ``pyautoattack`` or ``autoattack``, whichever is installed.

Both draw from torch's global generator, and both trace Python calls once: the caller forks the generator, the trace is
put back here.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..ops.pgd_step import pgd_step

VERSIONS = ("standard", "rand")
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def implementation() -> type:
    """The class ``AutoAttack`` of the package that is installed; ModuleNotFoundError says how to get one."""
    for package in ("pyautoattack", "autoattack"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package).AutoAttack
    raise ModuleNotFoundError(
        "AutoAttack is not installed: pip install 'purify-fast[eval]' (pyautoattack), or leave its rows out"
    )


def parts(version: str, classes: int) -> tuple[list[str], str | None]:
    """AutoAttack's attacks that can run with so many classes, and the one our margin attack must stand in for.

    The DLR loss needs 3 classes, its targeted form 4.
    """
    if version == "rand":
        return (["apgd-ce", "apgd-dlr"], None) if classes >= 3 else (["apgd-ce"], "apgd-dlr")
    if classes >= 4:
        return ["apgd-ce", "apgd-t", "fab-t", "square"], None
    return ["apgd-ce", *(["apgd-dlr"] if classes == 3 else []), "fab-t", "square"], "apgd-t"


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    version: str,
    classes: int,
    seed: int,
    batch_size: int,
    steps: int = 100,
    eot: int = 20,
    queries: int = 5000,
    chunk: int | None = None,
) -> tuple[Tensor, list[str]]:
    """Run AutoAttack on images the model classifies.

    Args:
        model: images [B, C, H, W] to logits; frozen by the caller, in the variant that is to be attacked.
        x, y: float32 in [0, 1] and int64 labels, on the model's device.
        version: ``standard`` (a deterministic model) or ``rand`` (gradients averaged over ``eot`` draws).
        steps, queries: of APGD and FAB, and of Square; AutoAttack's own are 100 and 5000.

    Returns:
        Adversarial images (the clean one where AutoAttack found none), and AutoAttack's warnings.
    """
    attacks, replaced = parts(version, classes)
    make = implementation()
    said: list[str] = []
    with _listening(said):
        options = {"norm": _NORMS[norm], "eps": eps, "seed": seed, "version": version, "device": x.device}
        known = inspect.signature(make.__init__).parameters  # type: ignore[misc]
        adversary = make(model, **options, **({"verbose": False} if "verbose" in known else {}))
        adversary.attacks_to_run = attacks
        adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = min(9, classes - 1)
        for part in (adversary.apgd, adversary.apgd_targeted):
            _set_steps(part, steps)
        adversary.fab.n_iter = steps
        adversary.square.n_queries = queries
        if version == "rand":
            adversary.apgd.eot_iter = eot
        size = "batch_size" if "batch_size" in inspect.signature(adversary.run_standard_evaluation).parameters else "bs"
        result = adversary.run_standard_evaluation(x, y, **{size: batch_size})
        found = result[0] if isinstance(result, tuple) else result  # autoattack returns the images alone
    if replaced is not None:
        with torch.no_grad():
            left = [
                part[model(found[part]).argmax(1) == y[part]]
                for part in torch.arange(len(x), device=x.device).split(batch_size)
            ]
        for part in torch.cat(left).split(batch_size):
            draws = eot if version == "rand" else 1
            ours = pgd(
                model, x[part], y[part], eps=eps, norm=norm, loss="margin", steps=steps, eot=draws,
                keep_best=True, seed=seed, sample_ids=part, chunk=chunk,
            )  # fmt: skip
            with torch.no_grad():
                wrong = model(ours).argmax(1) != y[part]
            found[part[wrong]] = ours[wrong]
    # AutoAttack rounds a little past the ball
    return pgd_step(found.detach(), torch.zeros_like(x), x, 0.0, eps, norm), said


def _set_steps(part, steps: int) -> None:
    """APGD derives its checkpoints from the number of steps when it is made."""
    part.n_iter = part.n_iter_orig = steps
    part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(r * steps), 1) for r in (0.22, 0.06, 0.03))


class _Listener(logging.Handler):
    def __init__(self, said: list[str]):
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().split(" See flags_doc")[0]
        # a compiled model's first call looks like a dynamic defence to it; the losses that cannot run are replaced
        known = "dynamic defense" in text or "it is not possible to use the" in text
        if not known and text not in self.said:
            self.said.append(text)


@contextlib.contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Collect AutoAttack's warnings instead of printing them; its tracing leaves no trace."""
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    handler, before = _Listener(said), (logger.propagate, logger.level)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.settrace(trace)
        logger.removeHandler(handler)
        logger.propagate, logger.level = before
