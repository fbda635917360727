"""What is run: one attack for each row, the default plan, and a published protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..attacks import LOSSES, TARGETED
from ..attacks.autoattack import Version
from ..ops.aggregate import METHODS, UNSAFE
from ..ops.apgd_step import NORMS as APGD_NORMS
from ..ops.pgd_step import NORMS
from .subject import Model, Variant

KINDS = ("pgd", "apgd", "fgsm", "bpda", "stadv", "autoattack")
CLASSIFIER = "classifier"  # as a target
LEE_KIM = "PGD-200 ce + EOT (Lee & Kim 2023)"
_OPTIONS = {  # of `Attack`, and the kinds they are of
    "steps": ("pgd", "apgd", "bpda", "stadv", "autoattack"),
    "alpha": ("pgd", "bpda", "stadv"),
    "start": ("pgd", "bpda"),
    "restarts": ("pgd", "apgd", "bpda", "stadv"),
    "smoothness": ("stadv",),
    "norm": ("pgd", "apgd", "fgsm", "bpda", "autoattack"),
    "targets": ("apgd",),
    "version": ("autoattack",),
    "queries": ("autoattack",),
}


@dataclass(frozen=True)
class Attack:
    """One attack; what is None is taken from `evaluate`'s arguments.

    Attributes:
        kind: ``pgd``, ``apgd``, ``fgsm``, ``bpda`` (PGD on `purify_fast.attacks.BpdaModel` of a defence with
            ``purify(x)`` and ``classifier``), ``stadv`` or ``autoattack``.
        loss: of all but AutoAttack: ``ce``, ``margin`` or ``dlr``, of APGD also ``dlr_targeted``; ``margin`` instead
            of ``dlr`` below 3 classes, of ``dlr_targeted`` below 4. None: ``ce``, of StAdv ``margin``.
        steps: of all but FGSM; of AutoAttack's APGD and FAB (None: 100). eot: draws per step (AutoAttack, None: 20).
        variant: which model is attacked and judged: ``random``, ``fixed`` or ``deterministic``.
        version: of AutoAttack: ``standard`` or ``rand``. queries: of its Square.
        target: attack this model instead, judge the defence: a transfer attack, or another head of the defence.
            ``"classifier"``: the defence's own, alone; the row's name says how little that shows.
        head: attack ``aggregate(defence.sample_logits(x), head)`` instead, judge the defence; of BPDA, how the logits
            of several draws are aggregated (None: the defence's own).
        label: the row's name; made from the rest if None. Another threat model or ``"classifier"`` is named after it.
        alpha: PGD's and BPDA's step in image units; StAdv's rate. start: whether PGD and BPDA begin at a random point.
        restarts: runs, but for AutoAttack and FGSM, of which each image keeps its worst; StAdv's first is without a
            flow, the others begin with random ones.
        targets: of ``dlr_targeted``: so many wrong classes, or all where there are fewer; a run for each.
        smoothness: of StAdv, its tau.
        eps, norm: another ball than the report's (``apgd``: ``linf`` or ``l2``); of StAdv, eps is the bound on the flow
            (None: 0.05). Such a row carries its threat model in its name and enters no headline and no ``worst`` but
            its own.
        limit: attack only the first so many images.
        survivors: attack only what the attacks before it, on this variant, left right; the row counts every image, as
            left after all of them. Cheap attacks first then save most of a costly one's work.
    """

    kind: str = "pgd"
    loss: str | None = None
    steps: int | None = None
    eot: int | None = None
    variant: Variant = "random"
    version: Version = "standard"
    queries: int = 5000
    target: Model | str | None = None
    head: str | None = None
    label: str | None = None
    alpha: float | None = None
    restarts: int = 1
    targets: int = 9
    limit: int | None = None
    survivors: bool = False
    start: bool = True
    smoothness: float | None = None
    eps: float | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        losses = (None, *LOSSES, *(TARGETED if self.kind == "apgd" else ()))
        norms = (None, *(APGD_NORMS if self.kind == "apgd" else NORMS))
        names = {
            "kind": KINDS,
            "loss": losses,
            "variant": get_args(Variant),
            "version": get_args(Version),
            "norm": norms,
        }
        for name, allowed in names.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(filter(None, allowed))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for option, kinds in _OPTIONS.items():
            if self.kind not in kinds and getattr(self, option) != getattr(Attack, option):
                raise ValueError(f"{option} goes with {', '.join(kinds)}, not with {self.kind}")
        if self.head not in (None, *METHODS, *UNSAFE):
            raise ValueError(f"head must be one of {', '.join(METHODS + UNSAFE)}, got {self.head!r}")
        if self.head is not None and self.target is not None:
            raise ValueError("an attack has a target or a head, not both")
        if isinstance(self.target, str) and self.target != CLASSIFIER:
            raise ValueError(f"target must be a model or {CLASSIFIER!r}, got {self.target!r}")
        if self.kind == "bpda" and self.target is not None:
            raise ValueError("bpda attacks the defence's own purifier: it takes no target")
        if self.norm is not None and self.eps is None:
            raise ValueError(f"the norm {self.norm} needs an eps of its own")
        for name in ("steps", "eot", "queries", "restarts", "targets", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("alpha", "smoothness", "eps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")


def default_attacks(base: Model | None = None) -> list[Attack]:
    """PGD with CE and DLR on the randomised and the deterministic model, BPDA, AutoAttack, transfer from ``base``."""
    own = [Attack(loss=loss, variant=variant) for variant in ("random", "deterministic") for loss in ("ce", "dlr")]
    auto = [Attack("autoattack", variant="fixed"), Attack("autoattack", version="rand")]
    transfer = [] if base is None else [Attack(target=base, label="transfer from the base")]
    return [*own, Attack("bpda"), *auto, *transfer]


def lee_kim_2023(eps: float = 8 / 255) -> Attack:
    """PGD + EOT of Lee & Kim, "Robust evaluation of diffusion-based adversarial purification", ICCV 2023.

    Full gradient, 200 steps of 0.007 at eps = 8/255, of the same share of any other eps, 20 draws averaged before the
    sign is taken, L-inf, no random start. Ours: of the iterates the best is kept, not the last.
    """
    alpha = 0.007 * eps / (8 / 255)
    return Attack(loss="ce", steps=200, alpha=alpha, eot=20, start=False, eps=eps, norm="linf", label=LEE_KIM)
