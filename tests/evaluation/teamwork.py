"""Evaluations that several processes share; run as a script, one of the processes.

    python teamwork.py FOLDER ACTIONS

ACTIONS is a list of (function of this file, arguments). What a function gives is written to FOLDER/FUNCTION-RANK.json.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from denoisers import Tiny

from purify_fast.attacks import APGD, FABT, PGD, Square
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec, cache, evaluate, team
from purify_fast.evaluation.measure import Measure
from purify_fast.methods.diffusion import DiffusionPurifier, Process
from purify_fast.training.distributed import torchrun_group

KINDS = ("deterministic", "random", "own", "diffusion", "stream")
RANK = int(os.environ.get("RANK", 0))


class Noisy(nn.Module):
    """A user's model that draws from torch's generator, for all images of a batch together."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.1 * torch.randn_like(x))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def images(model, count):
    """Images with the classes that a model gives them, but for every seventh one."""
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return x, y


def made(kind, out=None, **more):
    """The report on a model of this kind."""
    plain = net()
    x, y = images(plain, 80 if kind == "stream" else 22)
    options = {"eps": 0.04, "batch_size": 4, "n_eval": 2, "eot_iter": 2, "seed": 3, "out": out, "progress": False}
    options |= {"attacks": [PGD(steps=3), APGD(steps=4, restarts=2, nearest_first=0.5)]}
    if kind == "deterministic":
        options["attacks"] += [FABT(steps=3), Square(n_queries=20)]
        return evaluate(plain, x, y, **{"curve": [0.02, 0.08]} | options | more)
    if kind == "random":
        model = NoisyEnsemble(plain, 0.1, samples=2)
        fixed = AttackSpec(PGD(steps=2), "fixed")
        return evaluate(model, x, y, **options | {"attacks": [*options["attacks"], fixed]} | more)
    if kind == "own":
        # a function has nothing that tells whether it is the same: its rows are not kept
        model = Noisy(plain)
        return evaluate(lambda x: model(x), x, y, **options | more)
    if kind == "diffusion":
        torch.manual_seed(0)
        model = DiffusionPurifier(Tiny(1), plain, (1, 8, 8), Process(t_star=0.01, steps=2))
        return evaluate(model, x, y, **options | {"attacks": options["attacks"][:1]} | more)
    loader = [(x[i : i + 10], y[i : i + 10]) for i in range(0, len(x), 10)]
    return evaluate(Noisy(plain), loader, **options | {"batch_size": 8} | more)


def plain(report):
    """A report without the time that it took, with the margins of all images where it has them."""
    content = json.loads(report.to_json())
    for values, row in zip(content["rows"], report.rows, strict=True):
        del values["seconds"]
        if row.margins is not None:
            values["margins"] = row.margins.tolist()
    return content


def report(kind, out=None):
    return plain(made(kind, out))


def reports(out=None):
    return {kind: report(kind, out if out is None else f"{out}/{kind}") for kind in KINDS}


# -- what goes wrong --------------------------------------------------------------------------------------------------


def impatient():
    team.BEAT, team.SILENCE = 0.1, 1.5


def killed(kind, out, victim, number, moment="keep"):
    """A process is killed at its first, second, ... call of a function."""
    impatient()
    place, name = {
        "keep": (cache.PartialRow, "keep"),
        "write": (cache, "write_sealed"),
        "claim": (team.Team, "taken"),
        "judge": (Measure, "_judged"),
    }[moment]
    original, calls = getattr(place, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    if victim == RANK:
        setattr(place, name, call)
    return report(kind, out)


def killed_once(kind, out, victim, number):
    """The same in the first start only."""
    mark = Path(out, "killed")
    if mark.exists() or victim != RANK:
        return report(kind, out)
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return killed(kind, out, victim, number)


def counted(kind, out):
    """The report, and how many batches this process made."""
    original, calls = cache.PartialRow.keep, []
    cache.PartialRow.keep = lambda *args: calls.append(1) or original(*args)
    return [report(kind, out), len(calls)]


def stopped(kind, out):
    """The second process is stopped in its first batch, and goes on when the first has said that it is lost."""
    impatient()
    original, lost = cache.PartialRow.keep, Path(f"{out}.lost")

    class Told(logging.Handler):
        def emit(self, record):
            lost.touch()

    if RANK == 0:
        logging.getLogger("purify_fast").addHandler(Told())

    def keep(self, *args):
        if RANK == 1:
            wait = f"for i in $(seq 300); do [ -e {lost} ] && break; sleep 0.1; done"
            subprocess.Popen(["sh", "-c", f"{wait}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *args)

    cache.PartialRow.keep = keep
    try:
        return report(kind, out)
    except ConnectionError as error:
        return str(error)


def failing(who):
    """An attack that fails in one process."""

    def attack(model, x, y):
        if who == RANK:
            raise RuntimeError(f"process {RANK} has no memory")
        time.sleep(0.3)
        return x

    try:
        made("deterministic", attacks=[attack], curve=())
    except RuntimeError as error:
        return str(error)


def different():
    """Another seed in each process."""
    try:
        made("deterministic", seed=RANK)
    except ValueError as error:
        return str(error)


def alone():
    """The first process works alone, then all evaluate, each something else."""
    first = plain(made("random", together=False, seed=9)) if RANK == 0 else None
    return [first, plain(made("random", together=False, seed=RANK)), report("deterministic")]


def unseen():
    """Another machine has other temporary files."""
    team.VISIBLE = 0.5
    if RANK == 1:
        Path.is_dir = lambda self: False
    try:
        return report("own")
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, actions = sys.argv[1], eval(sys.argv[2])
    # torchrun's store has the addresses of those that it started before; a file or a port has none
    if "STORE" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=os.environ["STORE"], rank=RANK, world_size=world)
    with contextlib.nullcontext() if "STORE" in os.environ else torchrun_group():
        for name, arguments in actions:
            result = globals()[name](*arguments)
            Path(folder, f"{name}-{RANK}.json").write_text(json.dumps(result))
    if "STORE" in os.environ:
        dist.destroy_process_group()
