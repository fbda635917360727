"""The evaluation of AToP by its authors. Use it only for a comparison with their numbers.

The source is `evaluate.ipynb` of glin2022/atop at 9fa1e91; numbers in brackets are lines of the cell that defines
``Model_g``. The notebook runs AutoAttack of torchattacks, version standard, on generator and classifier together (59 to
102 and 144). Another prediction then decides (155 to 161), in 64 batches of 8 images (29 and 163). Its faults are:

- No noise is added, and the generator's input is in [0, 1] (94). It was fine-tuned on noisy images in [-1, 1] (line 147
  of Finetuning-AToP/cifar-miss-gau-adv.ipynb).
- Every prediction orders the blocks at random (77), divides them into four parts of 16 blocks, and hides part i in
  batch i (84). So no block is hidden in the last sixty batches.
- The version standard does not average gradients over draws (144). The repository's copy of torchattacks runs 10 steps
  of APGD and FAB, where AutoAttack's authors run 100; the notebook does not state the version that it imports.

The training notebooks attack only the classifier, and purify the result (lines 130 to 133 and 292 to 367 of
Finetuning-AToP/cifar-miss-gau-adv.ipynb). Tables 7 and 8 of the paper were made in the same way, with up to 1,000 steps
of PGD (second-hand: the authors' answers to their reviewers). None of their code is used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from purify_fast.attacks import PGD, OriginalAutoAttack
from purify_fast.attacks.bpda import classifier_of
from purify_fast.defences import WithFixedNoise
from purify_fast.defences.stochastic import with_samples
from purify_fast.evaluation import AttackSpec
from purify_fast.ops.random_transform import random_transform

NOTEBOOK = "as evaluate.ipynb (glin2022/atop)"
REPAIRED = f"{NOTEBOOK}, without its faults: one fixed draw"
LOG = 'as the training log of glin2022/atop, column "BPDA": PGD-20'
TABLES = 'as tables 7 and 8 of AToP\'s paper, "BPDA": PGD-1000'
ALONE = "on the classifier alone (not adaptive)"
#: The notebook divides the randomly ordered blocks into this number of parts, and hides part i in batch i.
PARTS = 4
#: Number of images in a batch of the notebook.
BATCH = 8
#: Number of steps of APGD and FAB in the repository's copy of torchattacks.
STEPS = 10


class ReleasedEvaluation(nn.Module):
    """The model that `evaluate.ipynb` attacks in its batch ``batch``: AToP without noise, in one pass."""

    def __init__(self, defence: nn.Module, batch: int):
        super().__init__()
        self.defence, self.hides = defence, batch < PARTS
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, classes]``, float32, of images ``[B, C, H, W]`` in [0, 1]."""
        defence: Any = self.defence
        x = x.to(defence.purifier_dtype)
        mask = torch.zeros_like(x[:, :1])
        if self.hides:
            seed, ids = defence.noise(len(x), x.device)
            ids, block = ids.expand(len(x)), defence.block
            drawn, _ = random_transform(
                x.detach(), seed, ids, sigma=0.0, block=block, mask_ratio=1 / PARTS, shared_mask=True
            )
            mask = drawn[:, -1:]
        packed = torch.cat([x * (1 - mask), torch.ones_like(mask), mask], 1)
        images = (defence.stages(packed)[-1].to(defence.purifier_dtype) + 1) / 2
        return defence.classify(images[:, None])[:, 0]


def evaluations(defence: Any, eps: float) -> list[tuple[nn.Module, AttackSpec]]:
    """Return the authors' evaluations of a defence. PGD returns its best point, the authors' PGD the last.

    A PGD step has the length eps / 4, because the authors use 2/255 for 8/255.
    """
    # The authors predict from one draw.
    one_draw = with_samples(defence, 1)
    alone, fixed = classifier_of(defence), WithFixedNoise(one_draw)
    first, later = (ReleasedEvaluation(defence, batch) for batch in (0, PARTS))
    few, released = PARTS * BATCH, OriginalAutoAttack(steps=STEPS)
    return [
        (fixed, AttackSpec(OriginalAutoAttack(), label=REPAIRED)),
        (first, AttackSpec(released, label=f"{NOTEBOOK}, with its faults, batches 1 to 4", max_images=few)),
        (later, AttackSpec(released, label=f"{NOTEBOOK}, with its faults, from batch 5 on")),
        (one_draw, AttackSpec(PGD(steps=20, alpha=eps / 4), through=alone, label=f"{LOG} {ALONE}")),
        (one_draw, AttackSpec(PGD(steps=1000, alpha=eps / 4), through=alone, label=f"{TABLES} {ALONE}")),
    ]
