"""Checkpoints of version 0.1 (commit 55787ee) are resumed, and end with the weights they would have ended with.

Each folder of files/checkpoints holds what a run of that commit left when it was interrupted in the middle of its
second epoch of three, and ``final.safetensors``, the weights of the same run when it was not.
"""

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import _races
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit
from purify_fast.training.checkpoint import read_tree

FILES = Path(__file__).parent / "files" / "checkpoints"
SHAPE = (1, 8, 8)
#: The ops that kernels served when these files were written. The files do not say so; the last bits depend on it.
SERVED = (
    "apgd_step", "gated_elu", "gated_elu_backward", "noisy_replay", "pgd_step", "philox", "random_transform",
    "reconstruction_loss", "representation_distance", "sample_latent", "stitch", "stitch_backward",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(module):
    """Weights from NumPy, whose streams never change: a defence's frozen classifier is not in its checkpoint alone."""
    state = np.random.RandomState(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                drawn = torch.from_numpy(state.standard_normal(tuple(p.shape)).astype(np.float32))
                p.copy_(drawn / max(1, p[0].numel()) ** 0.5)
    return module


def cnn():
    return seeded(SmallCNN(1, 10, (8, 8), 2))


def carso():
    return seeded(Carso(cnn(), ["conv2", "hidden"], SHAPE, 4, 3, 2, decoder_width=2, encoder_depth=1))


def atop():
    return seeded(Atop(cnn(), SmallGenerator(1, width=2), SHAPE, block=2, sigma=0.1))


def with_seeded_discriminator(task):
    seeded(task.discriminator)
    return task


def classifier_task():
    attack = TrainingAttack(eps=0.1, steps=2, relative_alpha=2.0, eps_warmup=0.5)
    return ClassifierTask(cnn(), ClassifierConfig(attack=attack))


def carso_published():
    config = CarsoConfig(
        attack=TrainingAttack(eps=0.2, steps=2, alpha=0.07),
        kl_delay=0.0,
        reduction="sum",
        optimizer="radam_lookahead",
        schedule="published",
        lookahead_steps=3,
        learning_rate=6.4e-3,
    )
    return CarsoTask(carso(), config)


def carso_pipeline():
    attack = TrainingAttack(eps=0.2, steps=2)
    config = CarsoConfig(attack_target="pipeline", attack=attack, train_samples=2, reconstruction_weight=0.05)
    return CarsoTask(carso(), config)


def atop_gan():
    config = AtopConfig(
        attack_method="pgd",
        attack=TrainingAttack(eps=0.1, steps=2),
        cls_delay_epochs=0,
        gan_grad=True,
        discriminator_width=1,
        learning_rate=1e-3,
        reconstruction_weight=0.5,
    )
    return with_seeded_discriminator(AtopTask(atop(), config))


def arrest_average():
    config = ArrestConfig(
        attack=TrainingAttack(eps=0.2, steps=2, alpha=0.15, random_start=False, eps_warmup=0.5),
        distillation_weight=5.0,
        ema_decay=0.7,
        awp_gamma=0.01,
        tau=1e-4,
    )
    return ArrestTask(cnn(), config, SHAPE)


TASKS = {
    "classifier": classifier_task,
    "carso_published": carso_published,
    "carso_pipeline": carso_pipeline,
    "atop_gan": atop_gan,
    "arrest_average": arrest_average,
}


def images():
    state = np.random.RandomState(1)
    return torch.from_numpy(state.randint(0, 256, (64, 1, 8, 8)).astype(np.uint8)), torch.arange(64) % 10


def final_weights(name):
    with safe_open(FILES / name / "final.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        return weights, file.metadata()


def todays_name(name):
    return name.replace("average.", "average.module.", 1) if name.startswith("average.") else name


def resumed(name, folder, **changes):
    shutil.copytree(FILES / name, folder)
    torch.manual_seed(0)
    task, steps = TASKS[name](), []
    after_step = task.after_step
    task.after_step = lambda: (steps.append(1), after_step())
    config = dataclasses.replace(FitConfig(3, 16, seed=3, checkpoint_seconds=0), **changes)
    with _races.held("cpu", {op: [{"eager": "cpp", "graph": "reference"}] for op in SERVED}):
        fit(task, *images(), config, folder, progress=False)
    return task, len(steps)


@pytest.mark.parametrize("name", TASKS)
def test_an_old_checkpoint_goes_on_to_the_same_weights(name, tmp_path):
    assert read_tree(FILES / name / "checkpoint.safetensors")["step"] == 6
    task, steps = resumed(name, tmp_path / "run")
    assert steps == 6 * len(task.optimizers)
    found, (wanted, facts) = task.model.state_dict(), final_weights(name)
    assert {todays_name(key) for key in wanted} | {"average.n_averaged"} == found.keys() | {"average.n_averaged"}
    same_machine = facts == {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    for key, value in wanted.items():
        if same_machine:
            assert torch.equal(found[todays_name(key)], value), key
        else:
            # another version of torch, or another CPU, rounds otherwise
            torch.testing.assert_close(found[todays_name(key)], value, rtol=1e-2, atol=1e-3)
    rows = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(rows) == 3 and rows[0] == (FILES / name / "log.jsonl").read_text().splitlines()[0]


@pytest.mark.parametrize("name", TASKS)
def test_an_old_checkpoint_is_resumed_with_the_same_settings_alone(name, tmp_path):
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed: 3 there, 4 now\)"):
        resumed(name, tmp_path / "run", seed=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CarsoConfig(eps=0.2, steps=3, alpha=0.1), "attack=TrainingAttack"),
        (lambda: CarsoConfig(lag=0.25), "kl_delay"),
        (lambda: AtopConfig(attack="pgd"), "attack_method"),
        (lambda: AtopConfig.published(warm_up=0), "cls_delay_epochs"),
        (lambda: ArrestConfig(weight=5.0), "distillation_weight"),
        (lambda: ArrestConfig(warm_up=0.5), "attack=TrainingAttack"),
        (lambda: ClassifierConfig(eps=0.1, warm_up=0.5), "attack=TrainingAttack"),
        (lambda: dataclasses.replace(CarsoConfig(), eps=0.2), "attack=TrainingAttack"),
    ],
)
def test_old_names_of_settings_work_with_a_warning(make, message):
    with pytest.warns(DeprecationWarning, match=message):
        make()


def test_old_names_mean_the_new_settings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert CarsoConfig(eps=0.2, steps=3, lag=0.25) == CarsoConfig(attack=TrainingAttack(0.2, 3), kl_delay=0.25)
        old = AtopConfig(attack="pgd", eps=0.1, steps=4, warm_up=0, reconstruction=0.5)
        assert old == AtopConfig("pgd", attack=TrainingAttack(0.1, 4), cls_delay_epochs=0, reconstruction_weight=0.5)
        arrest = ArrestConfig(eps=0.2, alpha=0.1, start=False, warm_up=0.5, weight=5.0, average=0.9, awp=0.01)
        attack = TrainingAttack(0.2, 10, alpha=0.1, random_start=False, eps_warmup=0.5)
        assert arrest == ArrestConfig(attack, distillation_weight=5.0, ema_decay=0.9, awp_gamma=0.01)
        assert (arrest.weight, arrest.eps, arrest.warm_up) == (5.0, 0.2, 0.5)
        classifier = ClassifierConfig(eps=0.1, steps=2)
        assert classifier.attack == TrainingAttack(0.1, 2, relative_alpha=2.0, eps_warmup=0.2)
        assert dataclasses.replace(old, eps=0.2).attack == TrainingAttack(0.2, 4)


def test_both_names_of_the_kind_of_attack_are_refused():
    with pytest.raises(TypeError, match="got both 'attack_method' and its old name 'attack'"):
        AtopConfig(attack="pgd", attack_method="fgsm")


@pytest.mark.parametrize("make", [carso_pipeline, atop_gan])
def test_the_old_method_training_step_gives_the_loss(make):
    from purify_fast.training import Batch

    defence = make().model
    defence = getattr(defence, "defence", defence).eval()
    x, y = images()
    batch = Batch(x[:8].float() / 255, y[:8], torch.arange(8), 1, 2, 3)
    with pytest.warns(DeprecationWarning, match="training_loss"):
        loss = defence.training_step(batch)
    assert loss.dim() == 0 and loss.isfinite()
