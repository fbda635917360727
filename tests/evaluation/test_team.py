"""An evaluation that several processes share has the rows of one, image by image, whatever happens to them."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forks import Victim, together, until
from teamwork import KINDS, kill_at_call, made, plain, report, reports

from purify_fast import cli
from purify_fast._files import folder_lock
from purify_fast.attacks import APGD
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.run import attack_run, stopping, team
from purify_fast.evaluation.run.attack_run import AttackRun
from purify_fast.evaluation.run.progress import Progress
from purify_fast.evaluation.run.row_judge import RowJudge

SCRIPT = Path(__file__).with_name("teamwork.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one():
    """The results of one process."""
    return reports()


def without_margins(report):
    return {**report, "rows": [{key: row[key] for key in row if key != "margins"} for row in report["rows"]]}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_are_those_of_one_process(one, tmp_path, world):
    """Also on the others but for the arrays beside the report."""
    done = together(tmp_path, world, lambda: reports(tmp_path / "out"))
    assert done.codes == [0] * world, done.errors
    assert done.results[0] == one
    for others in done.results[1:]:
        assert others == {kind: without_margins(one[kind]) for kind in KINDS}
    # the attacks found something, and not everything
    for kind in KINDS:
        accuracies = {row.get("mean", row["accuracy"]) for row in one[kind]["rows"]}
        assert len(accuracies) > 1 and min(accuracies) > 0.1, kind
    # nothing is left but the rows
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_dir() and path.parent.name == "rows"]


@pytest.mark.parametrize("kind", ["deterministic", "random"])
def test_the_order_in_which_batches_are_made_changes_nothing(one, tmp_path, monkeypatch, kind):
    """Also the first batch may be made last, after its process has died."""
    original = AttackRun.sums

    def backwards(self, obtain=None):
        for number in reversed(range(len(self.parts))) if self.folder else ():
            self.make(number)
        return original(self, obtain)

    monkeypatch.setattr(AttackRun, "sums", backwards)
    assert report(kind, tmp_path) == one[kind]


def test_processes_without_work_begin_with_the_next_attack(tmp_path):
    """The first process has one image of an attack; meanwhile the other makes all others, and the next attack."""
    begun, ahead = tmp_path / "begun", tmp_path / "ahead"

    def work():
        seeds, original = [], AttackRun.make

        def make(self, number):
            seeds.append(self.spec.seed)
            if self.spec.seed == 5 and dist.get_rank() == 0:
                begun.touch()
                until(ahead.exists)
            elif self.spec.seed == 5:
                until(begun.exists)
            batch = original(self, number)
            if seeds.count(7) == 6:
                ahead.touch()
            return batch

        with mock.patch.object(AttackRun, "make", make):
            return plain(made("deterministic", tmp_path / "out", curve=())), seeds

    done = together(tmp_path, 2, work)
    assert done.codes == [0, 0], done.errors
    (found, slow), (_, fast) = done.results
    assert found == plain(made("deterministic", curve=()))
    assert (slow.count(5), slow.count(7)) == (1, 0) and (fast.count(5), fast.count(7)) == (5, 6)


class Member(team.Team):
    """A process of a team whose processes are all in this process."""

    def __init__(self, rank, store):
        super().__init__(together=False)
        self.rank, self.world, self.store = rank, 2, store
        self.signs = SimpleNamespace(is_silent=lambda other: False)


def test_a_process_that_leaves_the_probes_late_makes_no_batch_of_an_attack_there(tmp_path):
    """The first process ends the probes and publishes the attack before the other process looks again."""
    store = dist.HashStore()
    first, other = Member(0, store), Member(1, store)
    attack = team.Task(0, 0, b"", [(9, "batch")], str(tmp_path), draws_differ=False)
    first.from_first("signs", list)
    first.publish([attack])
    assert list(other.batches(Progress(), "signs")) == []
    assert next(other.batches(Progress())) == (attack, 9)


@pytest.mark.parametrize(("batch_size", "evenly"), [(None, True), ("auto", True), (5, False)])
def test_without_a_batch_size_each_attack_is_divided_evenly(tmp_path, batch_size, evenly):
    """The model classifies 18 of 22 images correctly. Up to two images per process become batches of one image."""

    def work():
        sizes, original = {}, AttackRun.__post_init__

        def divide(self):
            original(self)
            sizes[self.spec.seed] = [[len(self.parts[each]) for each in numbers] for numbers in self.rounds]
            assert self.by_image == (self.spec.nearest is not None and {*map(len, self.parts)} == {1})

        attacks = [
            AttackSpec(APGD(steps=2)),
            AttackSpec(APGD(steps=3), until=0.01, seed=1),
            AttackSpec(APGD(steps=4), until=0.01, max_images=9, seed=2),
            AttackSpec(APGD(steps=5), nearest=6, seed=3),
            AttackSpec(APGD(steps=6), nearest=11, seed=4),
        ]
        with mock.patch.object(AttackRun, "__post_init__", divide), mock.patch.object(stopping, "SMALLEST", 4):
            made("deterministic", attacks=attacks, curve=(), batch_size=batch_size)
        return sizes

    done = together(tmp_path, 3, work)
    assert done.codes == [0] * 3, done.errors
    whole, rounds, few_rounds, few, many = (done.results[0][seed] for seed in range(5))
    # A round has at most four images: there are enough rounds for three processes, or too few.
    assert rounds == [[4], [4], [4], [4], [2]]
    if evenly:
        assert whole == [[6, 6, 6]] and few == [[1] * 6] and many == [[4, 4, 3]] and few_rounds == [[2, 2], [2, 1]]
    else:
        assert whole == [[5, 5, 5, 3]] and few == [[1] * 6] and many == [[1] * 11] and few_rounds == [[4], [3]]


def test_more_images_than_processes_can_take_at_once_are_divided_evenly_too():
    run = SimpleNamespace(shares=3, rule=None, index=torch.arange(1000))
    assert [len(part) for part in AttackRun._divided(run, run.index, 250, 1000)] == [167] * 4 + [166] * 2


@pytest.mark.slow
def test_rows_of_a_random_model_are_used_again_by_as_many_processes_only(tmp_path):
    """Without a batch size, another number of processes gives it other draws."""

    def evaluated(world, folder):
        done = together(folder.parent, world, lambda: plain(made("random", folder, batch_size=None)))
        assert done.codes == [0] * world, done.errors
        return done.results[0]

    (tmp_path / "two").mkdir(), (tmp_path / "three").mkdir()
    two, three = evaluated(2, tmp_path / "two" / "out"), evaluated(3, tmp_path / "three" / "out")
    assert two["about"].pop("divided") == "evenly among 2 processes" and two["rows"] != three["rows"]
    with mock.patch.object(AttackRun, "make", side_effect=AssertionError("made again")):
        assert evaluated(2, tmp_path / "two" / "out")["rows"] == two["rows"]
    assert evaluated(3, tmp_path / "two" / "out") == three


def test_probes_are_divided_evenly(tmp_path):
    def work():
        counts, original = [], team.Team.shared
        with mock.patch.object(
            team.Team, "shared", lambda self, works, *given: counts.append(len(works)) or original(self, works, *given)
        ):
            return plain(made("masked", batch_size=None)), counts

    done = together(tmp_path, 2, work)
    assert done.codes == [0, 0], done.errors
    assert [counts for _, counts in done.results] == [[2], [2]]
    whole = plain(made("masked", batch_size=None))
    assert done.results[0][0]["curves"]["defence"]["steps"] == whole["curves"]["defence"]["steps"]


def test_probes_in_parts_find_what_they_find_on_all_images(one):
    whole = plain(made("masked", batch_size=250))
    assert whole["curves"]["defence"]["steps"] == one["masked"]["curves"]["defence"]["steps"]


def counted(kind, out=None):
    """The report, and how many batches this process made."""
    calls, original = [], AttackRun.keep
    with mock.patch.object(AttackRun, "keep", lambda *args: calls.append(1) or original(*args)):
        return report(kind, out), len(calls)


def test_without_a_folder_nothing_is_left(one, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(team.tempfile, "tempdir", str(tmp_path / "temporary"))
    done = together(tmp_path, 2, lambda: (*counted("own"), report("deterministic")))
    assert done.codes == [0, 0], done.errors
    (first, mine, after), (_, others, _) = done.results
    # each makes its share, and a batch that both begin is made twice
    alone = counted("own")[1]
    assert first == one["own"] and alone <= mine + others <= alone + 2 and min(mine, others) > 0
    assert after == one["deterministic"]
    assert not list((tmp_path / "temporary").iterdir())


MOMENTS = {
    "keep": (AttackRun, "keep"),
    "write": (attack_run, "write_sealed"),
    "claim": (team.Team, "claimed"),
    "judge": (RowJudge, "judged"),
}


def killed(folder, kind, rank, number, moment="keep", store="file"):
    """One process is killed at its first, second, ... call of a function."""
    victim = Victim(folder, rank)

    def work():
        victim.wait_patiently()
        # the first process says goodbye to one that died with nothing to do
        team.GOODBYE = 1.0
        if dist.get_rank() == rank:
            kill_at_call(*MOMENTS[moment], number)
        return report(kind, folder / "out")

    return together(folder, 2, work, store, victim.is_killed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "victim", "number", "moment"),
    [
        ("deterministic", 1, 1, "keep"),
        ("random", 1, 3, "write"),
        ("random", 1, 2, "claim"),
        ("deterministic", 0, 2, "keep"),
        ("random", 0, 3, "write"),
        ("deterministic", 0, 2, "judge"),
    ],
)
def test_a_killed_process_costs_its_batch(one, tmp_path, kind, victim, number, moment):
    """The first process goes on without another one; without the first one the others end, and three go on."""
    done = killed(tmp_path, kind, victim, number, moment)
    # one that comes late finds nothing to do
    assert done.codes[victim] in (-signal.SIGKILL, 0), done
    if victim == 1:
        assert done.codes[0] == 0 and done.results[0] == one[kind], done.errors
        return
    assert done.codes == [-signal.SIGKILL, 1] and "no sign of life from process 0" in done.errors[1], done
    done = together(tmp_path, 3, lambda: report(kind, tmp_path / "out"))
    assert done.codes == [0] * 3 and done.results[0] == one[kind], done.errors


def test_the_first_process_is_killed_and_its_store_with_it(one, tmp_path):
    done = killed(tmp_path, "random", 0, 2, store="first")
    assert done.codes == [-signal.SIGKILL, 1] and "ProcessLost: process 1 of 2" in done.errors[1], done
    # what was finished is not made again
    done = together(tmp_path, 3, lambda: counted("random", tmp_path / "out"))
    assert done.codes == [0] * 3 and done.results[0][0] == one["random"], done.errors
    whole = together(tmp_path, 2, lambda: counted("random", tmp_path / "other"))
    assert sum(count for _, count in whole.results) > sum(count for _, count in done.results)


def test_one_that_was_stopped_ends_when_it_goes_on(one, tmp_path):
    """In its first batch, until the first process has said that it is lost."""
    told, victim = tmp_path / "told", Victim(tmp_path, 1)

    class Told(logging.Handler):
        def emit(self, record):
            told.touch()

    def work():
        victim.wait_patiently()
        if dist.get_rank() == 0:
            logging.getLogger("purify_fast").addHandler(Told())
            return report("random", tmp_path / "out")
        original = AttackRun.keep
        AttackRun.keep = lambda *args: (os.kill(os.getpid(), signal.SIGSTOP), original(*args))
        with pytest.raises(ConnectionError) as raised:
            report("random", tmp_path / "out")
        return str(raised.value)

    def stop_and_go_on(processes):
        victim.is_stopped(processes)
        until(told.exists)
        os.kill(processes.pids[1], signal.SIGCONT)

    done = together(tmp_path, 2, work, meanwhile=stop_and_go_on)
    assert done.codes == [0, 0], done.errors
    assert done.results[0] == one["random"] and "process 1 gave no sign of life" in done.results[1]


def refused(error, evaluate):
    """The words of an error in this process."""
    with pytest.raises(error) as raised:
        evaluate()
    return str(raised.value)


def test_what_goes_wrong_in_one_process_is_raised_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "VISIBLE", 0.5)

    def attack(model, x, y):
        if dist.get_rank() == 1:
            raise RuntimeError("process 1 has no memory")
        time.sleep(0.3)
        return x

    def work():
        yield refused(RuntimeError, lambda: made("deterministic", attacks=[attack], curve=()))
        # another seed in each process, or another division of the images
        yield refused(ValueError, lambda: made("deterministic", seed=dist.get_rank()))
        yield refused(ValueError, lambda: made("deterministic", batch_size=(None, 250)[dist.get_rank()]))
        if dist.get_rank() == 1:
            # another machine has other temporary files
            Path.is_dir = lambda self: False
        yield refused(ValueError, lambda: report("own"))

    done = together(tmp_path, 2, lambda: list(work()))
    assert done.codes == [0, 0], done.errors
    assert done.results[0] == done.results[1]
    failed, different, divided, unseen = done.results[0]
    assert failed == "process 1 has no memory"
    assert "process 1 evaluates something else than process 0 (different: seed" in different
    assert "(different: batch size)" in divided
    assert "does not see" in unseen and "give out=FOLDER" in unseen


def test_each_works_alone_if_asked(one, tmp_path):
    """The first process works alone, then all evaluate, each something else."""

    def work():
        rank = dist.get_rank()
        first = plain(made("random", together=False, seed=9)) if rank == 0 else None
        return first, plain(made("random", together=False, seed=rank)), report("deterministic")

    done = together(tmp_path, 2, work)
    assert done.codes == [0, 0], done.errors
    (first, own, shared), (nothing, others, _) = done.results
    assert shared == one["deterministic"] and nothing is None
    assert {report["about"]["seed"] for report in (first, own, others)} == {"9", "0", "1"}


@pytest.mark.slow
def test_the_command_by_several_processes(tmp_path):
    """The first process alone speaks and writes; a folder that is in use is refused in all of them."""
    words = "evaluate zoo:digits-pgd-at --images 10 --protocol fast --batch-size 4 --device cpu --out"
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert cli.main([*words.split(), str(alone)]) == 0

    def command():
        return cli.main([*words.split(), str(shared)])

    done = together(tmp_path, 2, command, "torchrun")
    assert done.results == [0, 0], done.errors
    assert done.errors[0].count("Robustness, L-inf") == done.errors[0].count("written:") == 1
    assert done.errors[1] == ""
    reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, shared)]
    for found in reports:
        for row in found["rows"]:
            del row["seconds"]
    assert reports[0]["rows"] == reports[1]["rows"] and reports[0]["notes"] == reports[1]["notes"]
    assert (shared / "run.yaml").is_file() == (alone / "run.yaml").is_file()
    with folder_lock(shared):
        refused = together(tmp_path, 2, command, "torchrun")
    assert 0 not in refused.results and "shared is in use by another run" in refused.errors[0], refused


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(one, tmp_path):
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert json.loads((tmp_path / "report.json").read_text()) == one["deterministic"]
