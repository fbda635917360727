"""An evaluation that several processes share has the rows of one, image by image, whatever happens to them."""

import functools
import itertools
import logging
import os
import signal
from unittest import mock

import pytest
import torch.distributed as dist
from evaluating import evaluate
from forks import kill_at_call, results_of, together
from shards_work import KINDS, made, plain, report, reports
from small_models import labelled

from purify_fast.attacks import PGD
from purify_fast.judge import runner
from purify_fast.judge.alarms import probes
from purify_fast.judge.results import cache
from purify_fast.judge.run.measure import AttackRun, Measure


@functools.cache
def one(kind):
    """The result of one process."""
    return report(kind)


def without_margins(report):
    return {**report, "rows": [{key: row[key] for key in row if key != "margins"} for row in report["rows"]]}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_are_those_of_one_process(tmp_path, world):
    """Also on the others but for the arrays beside the report."""
    first, *rest = results_of(tmp_path, world, lambda: reports(tmp_path / "out"))
    assert first == {kind: one(kind) for kind in KINDS}
    for others in rest:
        assert others == {kind: without_margins(one(kind)) for kind in KINDS}
    # the attacks found something, and not everything
    for kind in KINDS:
        accuracies = {row.get("mean", row["accuracy"]) for row in one(kind)["rows"]}
        assert len(accuracies) > 1 and min(accuracies) > 0.1, kind


def made_by(kind, out=None):
    """The report, and how many batches this process made."""
    calls, original = [], AttackRun.make
    with mock.patch.object(AttackRun, "make", lambda *args: calls.append(1) or original(*args)):
        return report(kind, out), len(calls)


def test_each_process_makes_its_share_and_the_first_keeps_all(tmp_path):
    """Only the first process needs the folder, so the processes need no common one."""
    done = results_of(tmp_path, 2, lambda: made_by("deterministic", tmp_path / f"out-{dist.get_rank()}"))
    (first, mine), (_, others) = done
    assert first == one("deterministic") and min(mine, others) > 0.3 * (mine + others)
    # the batches that follow the end of an attack by the rule of stopping are made for nothing
    alone = made_by("deterministic")[1]
    assert alone <= mine + others <= alone + 3 and not (tmp_path / "out-1" / "rows").exists()
    assert made_by("deterministic", tmp_path / "out-0") == (one("deterministic"), 0)


MOMENTS = {"make": (AttackRun, "make"), "write": (cache, "write_sealed"), "judge": (Measure, "judged")}


KILLS = [("deterministic", 1, 5, "make"), ("random", 0, 6, "write"), ("deterministic", 0, 2, "judge")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "victim", "number", "moment"), KILLS)
def test_a_killed_process_ends_the_others_and_three_go_on(tmp_path, kind, victim, number, moment):
    def work():
        if dist.get_rank() == victim:
            kill_at_call(*MOMENTS[moment], number)
        return report(kind, tmp_path / "out")

    done = together(tmp_path, 2, work)
    assert done.codes[victim] == -signal.SIGKILL and done.codes[1 - victim] == 1, done
    assert "ConnectionError" in done.errors[1 - victim] and "does not reach the others" in done.errors[1 - victim]
    # finished attacks are not computed again
    kept = list((tmp_path / "out").rglob("*.safetensors"))
    again = results_of(tmp_path, 3, lambda: made_by(kind, tmp_path / "out"))
    assert again[0][0] == one(kind)
    whole = results_of(tmp_path, 3, lambda: made_by(kind, tmp_path / "other"))
    assert kept and sum(count for _, count in again) < sum(count for _, count in whole)


def refused(error, evaluate):
    """The words of an error in this process."""
    with pytest.raises(error) as raised:
        evaluate()
    return str(raised.value)


def test_what_goes_wrong_in_one_process_is_raised_in_all(tmp_path):
    def attack(model, x, y):
        if dist.get_rank() == 1:
            raise RuntimeError("process 1 has no memory")
        return x

    def work():
        yield refused(RuntimeError, lambda: made("deterministic", attacks=[attack]))
        # another seed in each process, or another division of the images
        yield refused(ValueError, lambda: made("deterministic", seed=dist.get_rank()))
        yield refused(ValueError, lambda: made("deterministic", batch_size=(None, 25)[dist.get_rank()]))
        # the other process waits for a value that the first one fails to make
        with mock.patch.object(runner, "kernels_now", side_effect=RuntimeError("process 0 has no kernels")):
            yield refused(RuntimeError, lambda: report("own"))
        # the same error in both
        yield refused(ValueError, lambda: made("deterministic", predict="worst_of"))

    first, second = results_of(tmp_path, 2, lambda: list(work()))
    assert first == second
    failed, different, divided, no_value, _ = first
    assert failed == "process 1 has no memory"
    assert "process 1 evaluates something else than process 0 (different: seed" in different
    assert "(different: batch size)" in divided and no_value == "process 0 has no kernels"


def limited(kind, minutes):
    """The report of an evaluation that ends after some minutes; each process has a clock of its own speed."""
    clock, rank = itertools.count(), dist.get_rank()
    with mock.patch("time.monotonic", lambda: 50.0 * rank + (1 + rank) * next(clock)):
        return plain(made(kind, minutes=minutes))


@pytest.mark.parametrize("kind", ["random", pytest.param("masked", marks=pytest.mark.slow)])
def test_processes_end_together_where_the_time_is_over(tmp_path, kind):
    """In the plan, in probes, in searches of one process or of both: none waits for another for ever."""
    ended = set()
    for minutes in (0.3, 2, 6, 20, 60):
        first, second = results_of(tmp_path / str(minutes), 2, lambda minutes=minutes: limited(kind, minutes))
        assert without_margins(first)["rows"] == without_margins(second)["rows"]
        ended.add(first["about"].get("ended"))
    assert len(ended) > 2


def test_a_model_that_draws_under_attack_begins_again_in_all(tmp_path):
    """The first process finds it out, and the other begins again too."""
    first, _ = results_of(tmp_path, 2, lambda: plain(made("late")))
    assert first == plain(made("late")) and "judged as a random model" in str(first["notes"])


def test_each_works_alone_if_asked(tmp_path):
    """The first process works alone, then all evaluate, each something else."""

    def work():
        rank = dist.get_rank()
        first = plain(made("random", together=False, seed=9)) if rank == 0 else None
        return first, plain(made("random", together=False, seed=rank)), report("deterministic")

    (first, own, shared), (nothing, others, _) = results_of(tmp_path, 2, work)
    assert shared == one("deterministic") and nothing is None
    assert {report["about"]["seed"] for report in (first, own, others)} == {"9", "0", "1"}


#: The function during which the process is killed, and the number of the call.
ALONE = (
    # a batch of the second attack
    (AttackRun, "make", 8),
    # the arrays of a row are written, the row is not
    (cache, "write_sealed", 3),
    # an attack on the model with fixed noise was a row of its own
    (Measure, "judged", 3),
    # the probes before the attacks, then the answers after the attacks
    (probes._Short, "robust", 4),
    (probes, "sets_seed", 1),
)


def evaluated(out):
    """A random defence under attacks by its own gradients and those of other models, with probes of a few steps."""
    with mock.patch.multiple(probes, STEPS=2, ITERATIONS=(1, 3), DRAWS=(1, 2), JUDGES=3):
        return made("random", out, probes=True)


@pytest.mark.slow
def test_killed_anywhere_the_report_is_the_same(tmp_path):
    for i, moment in enumerate(ALONE):
        done = together(tmp_path, 1, lambda i=i, at=moment: kill_at_call(*at) or evaluated(tmp_path / str(i)), None)
        assert done.codes == [-signal.SIGKILL], done.errors
    whole = plain(evaluated(tmp_path / "whole"))
    assert len(whole["findings"]) == 9 and any(row["settings"].get("through") for row in whole["rows"])
    for i, moment in enumerate(ALONE):
        out = tmp_path / str(i)
        # the clean images come first, and each row is a file
        assert list((out / "rows").glob("*")), moment
        assert plain(evaluated(out)) == whole, moment


def few(out):
    with mock.patch.multiple(probes, STEPS=2, ITERATIONS=(1, 2)):
        return evaluate(*labelled(6), eps=0.1, attacks=[PGD(steps=2)], out=out, probes=True)


@pytest.mark.parametrize("kind", ["values", "arrays", "probes"])
def test_one_damaged_bit_of_a_kept_file_is_told_and_made_again(tmp_path, caplog, kind):
    first = few(tmp_path)
    paths = {path: ".values." in path.name for path in sorted((tmp_path / "rows").iterdir())}
    # the largest has the images of an attack
    path = max((path for path, of_probes in paths.items() if of_probes is (kind == "probes")), key=os.path.getsize)
    kept = path.read_bytes()
    damaged = bytearray(kept)
    # within the numbers: a file that can still be read
    damaged[-1 if kind == "arrays" else kept.rindex(b"0.") + 2] ^= 1
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "purify_fast"):
        assert plain(few(tmp_path)) == plain(first)
    assert f"{path} is damaged: the checksum does not match the content" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "purify_fast"):
        few(tmp_path)
    assert not caplog.text
    if kind == "probes":
        # of a row all but the time that it took
        assert path.read_bytes() == kept
