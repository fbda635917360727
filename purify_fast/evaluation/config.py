"""The settings of an evaluation, which `purify_fast.evaluation.evaluate` and the command line share.

This module does not import PyTorch: the command line's ``--help`` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from .._validation import Count, CudaGraphs, CudnnBenchmark, check_number, check_types

ProtocolName = Literal["fast", "standard", "rand", "strong", "official", "authors"]
#: How the predictions of a random model on an image decide: the image is right if all of them are right (worst_of), or
#: if their majority is right (votes).
Predict = Literal["worst_of", "votes"]
BatchSize = int | Literal["auto"]

#: The default number of images that are attacked together.
USUAL_BATCH = 250


@dataclass(frozen=True, repr=False)
class EvaluateConfig:
    """The settings of an evaluation. Model, images, ball and attacks are arguments of `evaluate` itself.

    Args:
        protocol: name of the list of attacks: "fast", Auto-PGD in minutes; "standard", AutoAttack's four with this
            package's engine; "rand", AutoAttack's version for random models; "strong", what a careful attacker would
            do, with surrogates, restarts and every target; "official", AutoAttack itself; "authors", the evaluation of
            the defence's authors, to compare with their numbers, not for the headline. The last two need the package
            pyautoattack. See `purify_fast.evaluation.attack_lists`. None: "standard", unless Python
            gives a list of attacks.
        steps: steps of PGD and APGD if the attack sets none; also the limit for a protocol's attacks, except a first
            attack of ten steps. FAB-T always takes its authors' 100.
        eot_iter: draws per step if the attack sets none; a deterministic model is attacked with one draw.
        n_eval: number of independent predictions on each adversarial image; 1 for a deterministic model.
        predict: how the predictions of a random model decide. "worst_of": an image has fallen if any of them is wrong.
            "votes": their majority is the model's prediction, which the attacks attack along the gradient of the mean
            probabilities. With either, the attacks know the rule, and each attack on the model as it is has a row
            beside it under fixed noise, if the model has ``fixed_noise``. None: an image has fallen if any of them is
            wrong, attacks look for images that five fresh draws misclassify, and fixed noise is attacked only if an
            attack says so.
        batch_size: images attacked together. "auto": 250, the default, with as many in one pass of the model as memory
            allows. That number is measured on a pass of a few images, and halved when memory runs out. The results are
            those of 250; but the draws of a random model depend on it, as with max_forward_batch. Functions, and
            attacks of other packages, are always given 250 images.
        max_forward_batch: most images in a forward pass of an attack (exact); None: no limit.
        memory: with batch_size "auto", the most memory of the model's device that this process may take in total, in
            bytes or as "20GB". None: all that is free; on a CPU within the limits of the process and of its control
            group.
        cuda_graphs: on a CUDA device, "auto" captures a step of an attack once its launches have cost as much as a
            capture, and keeps the graph if a replay saves at least a tenth; "always" does so wherever possible, "off"
            never. Choose "off" for a model that changes its settings while it is attacked, if it keeps them in an
            object of its own class that is not a module, dataclass or namespace: a captured step does not see such
            changes.
        cudnn_benchmark: on a CUDA device, "on" and "auto" let cuDNN race its algorithms once for each shape of a batch;
            "auto" does not if the process asks for deterministic algorithms. The winner, and with it the last bits of a
            gradient, may differ from run to run.
        seed: seed of everything random.
        curve: further radii, in image units. At each radius the images that still stand are attacked by the report's
            attacks without a radius of their own, from the best point of the smaller radius on. Each radius has a row,
            such as "worst, L-inf 2/255"; `Report.curve` has all of them.
        probes: whether to test if the number can be believed: by short attacks on a few images over the
            steps and the draws, small steps in random directions, and the same images again. None: with every protocol
            but "authors", and not with a list of attacks.
        keep: attacked images that the report keeps. "some": a few of each row, for its pictures. "all": also every
            fallen image, exactly as the model saw it, in a file beside the report, about 4 KB for each image of
            CIFAR-10. `check_witnesses` and the command `purify-fast check` try them again.
        claim: the claimed robust accuracy, in percent, such as 70: the report says whether the result refutes it, and
            how many images would decide.
        dataset_name: name of the data set, for the report's title; None: the command line names that of its images.
        together: whether the processes of torch's default process group share the work. Each process then makes the
            same evaluation, and attacks batches of batch_size images. The rows equal those of one process. Only the
            first process writes and shows anything; the others get the report without pictures. Machines that do not
            share temporary files need a shared folder for the rows. False: each process works by itself.

    Raises:
        TypeError: claim, or a radius of curve, is not a number.
        ValueError: a setting that is not allowed; the message names it.
    """

    protocol: ProtocolName | None = None
    steps: Count = 100
    eot_iter: Count = 5
    n_eval: Count = 5
    predict: Predict | None = None
    batch_size: BatchSize = USUAL_BATCH
    max_forward_batch: Count | None = None
    memory: int | str | None = None
    cuda_graphs: CudaGraphs = "auto"
    cudnn_benchmark: CudnnBenchmark = "off"
    seed: int = 0
    curve: tuple[float, ...] = ()
    probes: bool | None = None
    keep: Literal["some", "all"] = "some"
    claim: float | None = None
    dataset_name: str | None = None
    together: bool = True

    def __post_init__(self) -> None:
        check_claim(self.claim)
        for radius in self.curve:
            check_number("each of curve", radius)
        # A frozen dataclass refuses a plain assignment to an attribute.
        object.__setattr__(self, "curve", tuple(self.curve))
        check_types(self)

    def __repr__(self) -> str:
        given = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        words = (f"{name}={value!r}" for name, value, usual in given if value != usual)
        return f"EvaluateConfig({', '.join(words)})"

    def has_signs(self, attacks: Sequence[Any] | None) -> bool:
        """Tell whether an evaluation looks for signs of a failed attack.

        Args:
            attacks: the list of attacks in place of a protocol, if there is one.
        """
        if self.probes is not None:
            return self.probes
        return attacks is None and self.protocol != "authors"


def check_claim(claim: Any) -> None:
    """Check a claimed accuracy.

    Args:
        claim: robust accuracy in percent; None: no claim.

    Raises:
        TypeError: claim is not a number.
        ValueError: claim is outside 0 to 100, or above 0 and at most 1, as a share of 1 would be.
    """
    if claim is None:
        return
    if isinstance(claim, bool) or not isinstance(claim, (int, float)):
        raise TypeError(
            f"claim must be a number of percent from 0 to 100, got {claim!r}: give a number, such as claim=70"
        )
    if not 0 <= claim <= 100:
        raise ValueError(f"claim must be from 0 to 100, got {claim!r}: give percent of robust accuracy, such as 70")
    if 0 < claim <= 1:
        raise ValueError(
            f"claim must be in percent, got {claim!r}: write a claim of {100 * claim:g} % as claim={100 * claim:g}. "
            "Claims above 0 % and up to 1 % cannot be tested"
        )
