"""A run keeps the rates of parameter groups, takes numbers as names, and warns of a network that was edited."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from small_models import Made
from small_runs import StopAt, Stopped, images
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.models.layers import AveragedModel, Synchronized, synchronized
from purify_fast.nn import EMA
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, Task, fit
from purify_fast.training.optimizers import relative_rates

X = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 4


class FineTuning(Task):
    """Two groups, the first with a smaller rate, and a schedule that falls."""

    def __init__(self, model=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4)) if model is None else model
        first, *others = self.model.parameters()
        self.optimizer = torch.optim.SGD([{"params": [first], "lr": 1e-5}, {"params": others}], lr=0.1)

    def training_step(self, batch):
        return F.cross_entropy(self.model(batch.x), batch.y), {}

    def learning_rate(self, progress, epoch, epochs):
        return 0.1 * (1 - progress)

    def describe(self):
        return {"task": "fine-tuning"}


def test_the_rates_of_groups_keep_their_ratio_also_after_a_kill(tmp_path):
    rates = []
    for folder in (None, tmp_path):
        task, loop = FineTuning(), FitConfig(epochs=2, batch_size=16, checkpoint_seconds=0)
        if folder is not None:
            with pytest.raises(Stopped):
                fit(task, X, Y, loop, folder, progress=False, callbacks=[StopAt(5)])
            task = FineTuning()
        fit(task, X, Y, loop, folder, progress=False)
        rates.append([group["lr"] for group in task.optimizer.param_groups])
    assert rates[0] == rates[1] == pytest.approx([0.1 * 1e-4 / 8, 0.1 / 8])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("0", nn.Parameter(torch.zeros(64, 4)))

    def forward(self, x):
        return x.flatten(1) @ self.get_parameter("0")


def run(model, folder, *callbacks):
    task = ClassifierTask(model, ClassifierConfig())
    config = FitConfig(epochs=2, batch_size=16, checkpoint_seconds=0)
    fit(task, X, Y, config, folder, progress=False, callbacks=callbacks)
    return task.model


def test_a_parameter_may_be_named_by_a_number(tmp_path):
    whole = run(Named(), None)
    with pytest.raises(Stopped):
        run(Named(), tmp_path, StopAt(5))
    assert torch.equal(run(Named(), tmp_path).get_parameter("0"), whole.get_parameter("0"))


def test_a_model_without_weights_to_train_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="task must have a weight to train"):
        run(model, None)


def network(kind):
    """Networks whose code is edited: their parts and weights are the same, or one part has no weights."""
    torch.manual_seed(0)
    if kind in ("relu", "silu"):
        between = nn.ReLU() if kind == "relu" else nn.SiLU()
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), between, nn.Linear(8, 4))
    scale = {"one": 1.0, "two": 2.0}[kind]
    return Made(lambda self, x: self.fc(x.flatten(1) * self.scale), fc=nn.Linear(64, 4), scale=scale)


EDITS = [("relu", "relu", 0), ("relu", "silu", 1), ("one", "two", 1), ("one", "one", 0)]


@pytest.mark.parametrize("kind", [lambda model: ClassifierTask(model, ClassifierConfig()), FineTuning])
@pytest.mark.parametrize(("first", "then", "told"), EDITS)
def test_a_network_that_was_edited_continues_with_a_warning(first, then, told, kind, tmp_path, caplog):
    loop = FitConfig(epochs=2, batch_size=16, checkpoint_seconds=0)
    with pytest.raises(Stopped):
        fit(kind(network(first)), X, Y, loop, tmp_path, progress=False, callbacks=[StopAt(5)])
    fit(kind(network(then)), X, Y, loop, tmp_path, progress=False)
    said = [record.getMessage() for record in caplog.records if "was its code edited" in record.getMessage()]
    assert len(said) == told and all("gives other outputs" in each for each in said)


def test_an_average_of_half_precision_moves():
    model = nn.Linear(4, 4).half()
    average = EMA(model, decay=0.999)
    before = average.average.module.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(3):
        average.update(model)
    moved = average.average.module.weight - before
    assert moved.dtype == torch.float32 and torch.allclose(moved, torch.full_like(moved, 1 - 0.999**3), rtol=1e-2)


OPTIMIZERS = [
    (lambda a, b: torch.optim.SGD([a, b], lr=0.0), [1.0]),
    (lambda a, b: torch.optim.SGD([{"params": a, "lr": 0.1}, {"params": b, "lr": 0.01}]), [1.0, 0.1]),
    (lambda a, b: torch.optim.SGD([{"params": a, "lr": 0.1}], lr=0.1), [1.0]),
    (lambda a, b: torch.optim.SGD([{"params": a}, {"params": b, "lr": 0.0}], lr=0.1), [1.0, 0.0]),
    (lambda a, b: torch.optim.lr_scheduler.LinearLR(torch.optim.SGD([a, b], lr=0.1), 0.01).optimizer, [1.0]),
]


@pytest.mark.parametrize(("make", "shares"), OPTIMIZERS)
def test_relative_rates(make, shares):
    a, b = (nn.Parameter(torch.zeros(2)) for _ in "ab")
    assert relative_rates(make(a, b)) == pytest.approx(shares)


def test_a_resumed_run_has_the_relative_rates_of_the_present_code(tmp_path):
    def rates(share, *callbacks):
        task = ClassifierTask(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), ClassifierConfig())
        weight, bias = task.model[1].parameters()
        task.optimizer = torch.optim.SGD([{"params": weight, "lr": 0.1}, {"params": bias, "lr": 0.1 * share}])
        fit(task, X, Y, FitConfig(2, 16, checkpoint_seconds=0), tmp_path, progress=False, callbacks=callbacks)
        return relative_rates(task.optimizer)

    with pytest.raises(Stopped):
        rates(0.1, StopAt(5))
    assert rates(0.5) == pytest.approx([1.0, 0.5])


def test_a_model_on_several_devices_or_of_dtensors_is_refused_before_any_work():
    x, y = torch.zeros((4, 1, 8, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    parts = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"weights are on several devices \(device_map\), cpu, meta: move the model"):
        fit(ClassifierTask(parts, ClassifierConfig()), x, y, FitConfig(1, 4), progress=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight, init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match="has DTensors as weights"):
            fit(ClassifierTask(model, ClassifierConfig()), x, y, FitConfig(1, 4), progress=False)
    finally:
        dist.destroy_process_group()


def test_a_module_that_is_synchronized_is_copied_and_saved_as_its_own_class():
    norm = torch.nn.BatchNorm2d(3)
    norm.__class__ = synchronized(torch.nn.BatchNorm2d)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is torch.nn.BatchNorm2d and torch.equal(other.weight, norm.weight)
    assert isinstance(norm, Synchronized)


def test_the_count_of_a_moving_average_stays_on_the_host():
    average = AveragedModel(torch.nn.Linear(2, 2), 0.9).to("meta")
    assert average.n_averaged.device.type == "cpu" and int(average.n_averaged) == 1


# -- parts of a model that the user froze stay as they are -------------------------------------------------------------


def model(affine=True):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=affine), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(backbone, nn.Flatten(), nn.Linear(108, 2))


def statistics(made):
    return {name: value.clone() for name, value in made.state_dict().items() if "running" in name or "0.0" in name}


def trained(made, task=None, **options):
    """The modes in the steps of a training with a validation, and whether the backbone's tensors stayed."""
    task, before, modes = task or ClassifierTask(made, ClassifierConfig()), statistics(made), []
    step = task.training_step
    task.training_step = lambda batch: modes.append([part.training for part in made[0]]) or step(batch)
    config = FitConfig(2, 16, validation_share=0.25, **options)
    fit(task, *images(), config, progress=False)
    assert len(made[0]) == len(modes[0]) and all(one == modes[0] for one in modes)
    return modes[0], all(torch.equal(value, before[name]) for name, value in statistics(made).items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_that_was_frozen_in_evaluation_mode_is_not_changed(affine, whole):
    """Also if the model as a whole is in evaluation mode, as after loading, and also by a method's training."""
    for method in ("classifier", "arrest"):
        made = model(affine)
        (made if whole else made[0]).eval()
        made[0].requires_grad_(False)
        task = ArrestTask(made, ArrestConfig(), (1, 8, 8), ["0"]) if method == "arrest" else None
        modes, same = trained(made, task)
        assert modes[1:] == [False] * 3 and same


def test_a_part_without_weights_stays_frozen_in_a_part_that_trains():
    made = model(affine=False)
    made[0][1].eval()
    made[0][3].eval()
    modes, _ = trained(made)
    assert modes == [True, False, True, False]


def test_a_loaded_model_is_trained():
    assert trained(model().eval()) == ([True] * 4, False)


def test_weights_frozen_in_training_mode_keep_that_mode():
    made = model()
    made[0].requires_grad_(False)
    modes, same = trained(made)
    assert modes == [True] * 4 and not same
