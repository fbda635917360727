"""AToP as its authors evaluate it: the protocol "authors", for comparison with their numbers and for nothing else.

`evaluate.ipynb` of glin2022/atop at 9fa1e91 (the cell that defines ``Model_g``, by line of that cell) runs AutoAttack
of torchattacks, version standard, on generator and classifier together (lines 59 to 102 and 144) and judges by one more
prediction (155 to 161), on 64 batches of 8 images (29 and 163). It differs from the system that was trained:

- No noise is added (94), although the generator was fine-tuned on noisy images.
- The generator is given images in [0, 1] (94), although it was fine-tuned on [-1, 1] (line 147 of
  Finetuning-AToP/cifar-miss-gau-adv.ipynb).
- The hidden blocks are drawn in every prediction (77): a slice of their random order at the number of the batch (84),
  which has 16 of 64 blocks in the first four batches, and none in the sixty after them.
- The version standard expects the same answer every time, and averages over no draws (144). The copy of torchattacks in
  the repository takes 10 steps of APGD and FAB where AutoAttack's authors take 100; the notebook imports the package of
  that name, in a version that it does not state.

The training notebooks attack the classifier alone and purify the result (lines 130 to 133 and 292 to 367 of
Finetuning-AToP/cifar-miss-gau-adv.ipynb). The notebook with a log calls the column of PGD with 20 steps "BPDA" (line
393 of Finetuning-AToP/0..1 cifar-miss-gau-adv.ipynb). The authors say that tables 7 and 8 of the paper do the same,
with up to 1,000 steps of PGD (second-hand: their answers to their reviewers). No line of that code is used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import PGD, AutoAttack
from ...evaluation import AttackSpec
from ...evaluation.surrogates import FewerSamples
from ...ops.random_transform import random_transform

NOTEBOOK = "as evaluate.ipynb (glin2022/atop)"
LOG = 'as the training log of glin2022/atop, column "BPDA": PGD-20'
TABLES = 'as tables 7 and 8 of AToP\'s paper, "BPDA": PGD-1000'
#: The notebook cuts the random order of the blocks into so many parts, and hides one in each of the first batches.
PARTS = 4
#: Images in a batch of the notebook.
BATCH = 8
#: Steps of APGD and FAB in the repository's copy of torchattacks.
STEPS = 10


class ReleasedEvaluation(nn.Module):
    """The model that `evaluate.ipynb` attacks: AToP without noise, given images in [0, 1], and often nothing hidden.

    Args:
        defence: an `Atop`; whichever its transform is, one pass with one mask is made, as in the notebook.
        batch: the number of the notebook's batch, from 0: a quarter of the blocks is hidden below 4, none from 4 on.
            They are drawn in every prediction, the same for all of its images.
    """

    def __init__(self, defence: nn.Module, batch: int):
        super().__init__()
        self.defence, self.hides = defence, batch < PARTS
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``, float32.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
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
        images = (defence.stages(packed)[-1] + 1) / 2
        return defence.classify(images[:, None])[:, 0]


def authors_attacks(defence: nn.Module, eps: float) -> list[AttackSpec]:
    """The rows of the protocol "authors", see this module.

    PGD keeps the best of its points, where the authors' takes the last.

    Args:
        defence: an `Atop`.
        eps: radius in image units; the authors' step of 2/255 at 8/255 is a quarter of it.
    """
    # the authors predict from one draw
    one_draw = FewerSamples(defence, 1) if defence.samples != 1 else defence
    first, later = (ReleasedEvaluation(defence, batch) for batch in (0, PARTS))
    few, released = PARTS * BATCH, AutoAttack(steps=STEPS)
    return [
        AttackSpec(AutoAttack(), "fixed", label=f"{NOTEBOOK}, without its faults: one fixed draw", judge=one_draw),
        AttackSpec(released, label=f"{NOTEBOOK}, with its faults, batches 1 to 4", judge=first, max_images=few),
        AttackSpec(released, label=f"{NOTEBOOK}, with its faults, from batch 5 on", judge=later),
        *(
            AttackSpec(PGD(steps=steps, alpha=eps / 4), target="classifier", label=label, judge=one_draw)
            for steps, label in ((20, LOG), (1000, TABLES))
        ),
    ]
