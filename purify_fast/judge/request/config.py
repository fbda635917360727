"""The settings of an evaluation, for `evaluate` and the command line, whose ``--help`` does not wait for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, Literal

from ..._validation import Count, CudaGraphs, CudnnBenchmark, Positive, check_types

ProtocolName = Literal["fast", "standard", "rand", "strong", "official"]
#: The rule by which the attacks know how several predictions of a random model on an image decide.
Predict = Literal["worst_of"]

#: The largest number of images that are attacked together by default.
USUAL_BATCH = 250


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of an evaluation, without model, images, ball and attacks. Many are also keywords of `evaluate`.

    Args:
        protocol: name of a list of attacks. "fast": Auto-PGD, in minutes. "standard": the four attacks of AutoAttack in
            this package's faster versions. "rand": AutoAttack's version for random models. "strong": adaptive attacks,
            with surrogate models, restarts and every target class. "official": AutoAttack itself, from the package
            pyautoattack. None: the list ``attacks`` of `evaluate`, or else "standard". The evaluations by the defences'
            authors are in the repository, in benchmarks/robustness/authors.
        steps: number of steps of PGD and APGD, for attacks that set none. It also limits the steps of a protocol's
            attacks, but not of a first attack with ten steps. FAB-T takes 100 steps, as in its authors' code.
        eot_iter: number of draws averaged per step, for attacks that set none; 1 on a deterministic model. Each draw of
            a `purify_fast.defences.MajorityVote` counts.
        n_eval: number of independent predictions on each adversarial image; 1 for a deterministic model.
        predict: "worst_of": an image of a random model has fallen if any of its predictions is wrong, and the attacks
            know this rule. None: an image has fallen if any prediction is wrong too, but attacks search for images that
            all of five fresh draws misclassify; "fast" without a claim searches as with "worst_of". For the majority
            vote of several draws, evaluate a `purify_fast.defences.MajorityVote`.
        batch_size: number of images that are attacked together. None: 250. Whenever memory runs out, the work is done
            again, and the passes of the model have half as many images from then on. This changes the draws of a random
            model, as every other batch size does, but not the result of a deterministic model. Attacks that are
            functions or belong to other packages get a whole batch at once.
        max_forward_batch: largest number of images in a forward pass of an attack, which changes no result of a
            deterministic model. None: no limit.
        cuda_graphs: use of CUDA graphs for steps of attacks. "auto": a step is captured after 15 launches. "always":
            every step that can be captured is captured. "off": no step is captured. Choose "off" if the model reads
            what changes outside of its attributes, such as a global variable or the content of a NumPy array: a graph
            does not follow such changes.
        cudnn_benchmark: on a CUDA device, "on" and "auto" let cuDNN measure its algorithms for each shape of a batch,
            and use the fastest; "auto" is "off" if the process requires deterministic algorithms. The last bits of a
            gradient may then differ from run to run.
        seed: seed of all random numbers.
        probes: whether to test if the robust accuracy is reliable, by short attacks, small steps in random directions,
            and repeated predictions. Default: with every protocol. With a list of attacks, only compare the gradients
            with small steps on 16 images, which False leaves out too.
        claim: a claimed robust accuracy, in percent, such as 70. The report says whether the result refutes it, and how
            probable such a result is if the claim is true. A random model is tested by the accuracy of one draw.
        minutes: largest number of minutes that the evaluation may take, except for the checks of the model, and for the
            batch that it is in when the time is over. The most telling attacks come first; the report names those that
            were left out, or cut short at their best points. Finished rows are kept in ``out``, so the same call with
            more minutes continues.
        dataset_name: name of the data set, for the report's title. On the command line, the default is that of --data.
        together: whether the processes of torch's default process group share the work. Each process calls `evaluate`
            with the same arguments; the result is that of a single process, bit by bit. Only the first process writes
            and prints; the others get the report without pictures. False: each process makes a separate evaluation.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    protocol: ProtocolName | None = None
    steps: Count = 100
    eot_iter: Count = 5
    n_eval: Count = 5
    predict: Predict | None = None
    batch_size: Count | None = None
    max_forward_batch: Count | None = None
    cuda_graphs: CudaGraphs = "auto"
    cudnn_benchmark: CudnnBenchmark = "off"
    seed: int = 0
    probes: bool | None = None
    claim: float | None = None
    minutes: Positive | None = None
    dataset_name: str | None = None
    together: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.claim is not None and not (self.claim == 0 or 1 < self.claim <= 100):
            raise ValueError(f"claim must be 0, or a percentage above 1 and at most 100, got {self.claim!r}")


def config_of(config: EvaluateConfig | None, options: Mapping[str, Any]) -> EvaluateConfig:
    """Replace fields of a config, or of the defaults, by the options of the same names that are not None."""
    if not isinstance(config, (EvaluateConfig, NoneType)):
        raise TypeError(f"config must be an EvaluateConfig, got {config!r}")
    names = [field.name for field in fields(EvaluateConfig) if options.get(field.name) is not None]
    return replace(config or EvaluateConfig(), **{name: options[name] for name in names})
