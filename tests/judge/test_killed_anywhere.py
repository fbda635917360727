"""An evaluation that is killed at any moment goes on with the identical report: in rows, surrogates, files, probes."""

import logging
import os
import re
import signal
import sys
from unittest import mock

import pytest
from evaluating import evaluate
from forks import together
from shards_work import kill_at_call, plain
from small_models import labelled

from purify_fast.attacks import APGD, PGD
from purify_fast.defences import NoisyEnsemble
from purify_fast.evaluation import AttackSpec
from purify_fast.judge.alarms import probes
from purify_fast.judge.surrogates.copies import Softened

#: The function during which the process is killed, and the number of the call.
MOMENTS = (
    # a batch of the second attack
    ("purify_fast.judge.run.attack_run.AttackRun.make", 4),
    # the arrays of a row are written, the row is not
    ("purify_fast.judge.run.cache.write_sealed", 3),
    # the softened copy was attacked in a row of its own
    ("purify_fast.judge.run.measure.Measure.judged", 3),
    # the probes before the attacks, then the answers after the attacks
    ("purify_fast.judge.alarms.probes._Short.robust", 4),
    ("purify_fast.judge.alarms.probes.sets_seed", 1),
)


def killed_at(name, number):
    """This process is killed when it calls a function for the first, second, ... time."""
    parts = name.split(".")
    depth = max(i for i in range(len(parts)) if ".".join(parts[:i]) in sys.modules)
    place = sys.modules[".".join(parts[:depth])]
    for part in parts[depth:-1]:
        place = getattr(place, part)
    kill_at_call(place, parts[-1], number)


def evaluated(out):
    """A random defence under attacks by its own gradients and by a softened copy's, with probes of a few steps."""
    net, x, y = labelled(12, classes=5)
    model = NoisyEnsemble(net, 0.2, samples=2)
    soft = AttackSpec(APGD(steps=3), through=Softened(model, 10.0), label="softened", survivors_only=True)
    attacks = [PGD(steps=2), PGD(steps=2, loss="dlr"), soft]
    short = {"STEPS": 2, "ITERATIONS": (1, 3), "DRAWS": (1, 2), "JUDGES": 3}
    options = {"eps": 0.03, "probes": True, "eot_iter": 2, "n_eval": 2, "batch_size": 6, "seed": 3}
    with mock.patch.multiple(probes, **short):
        return evaluate(model, x, y, attacks=attacks, out=out, **options)


@pytest.mark.slow
def test_killed_anywhere_the_report_is_the_same(tmp_path):
    for i, moment in enumerate(MOMENTS):
        done = together(tmp_path, 1, lambda i=i, at=moment: killed_at(*at) or evaluated(tmp_path / str(i)), None)
        assert done.codes == [-signal.SIGKILL], done.errors
    whole = plain(evaluated(tmp_path / "whole"))
    assert len(whole["findings"]) == 8 and any("through" in row["settings"] for row in whole["rows"])
    for i, moment in enumerate(MOMENTS):
        out = tmp_path / str(i)
        # the clean images come first, and each row and each probe is a file
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


@pytest.mark.parametrize("probes", [False, True])
def test_a_log_gets_plain_lines_with_the_rate_and_the_time_left(capsys, monkeypatch, probes):
    for name in ("LINE_EVERY", "FIRST_LINE"):
        monkeypatch.setattr(f"purify_fast.judge.run.progress.{name}", 0.0)
    attacks = [PGD(steps=2), PGD(steps=3)]
    report = evaluate(*labelled(6), eps=0.01, attacks=attacks, name="mine", probes=probes, progress=True)
    lines = capsys.readouterr().err.splitlines()
    # the probes come first, as rows of their own
    asked = [re.match(r"mine: row (\d+) of (\d+), probe: ", line) for line in lines]
    numbers = {(int(found[1]), int(found[2])) for found in asked if found}
    last = max(number for number, _ in numbers) if numbers else 0
    assert all(of == number + 2 for number, of in numbers) and (len(numbers) > 3) is probes
    first = f"mine: row {last + 1} of {last + 2}, PGD-2 ce:"
    assert any(line.startswith(first) and "predictions/s" in line for line in lines)
    # The plan tells no time and no number that it does not know.
    assert lines.count("mine: plan: 2 attacks on 6 images") == 1 and not any("left" in line for line in lines)
    assert not any("\r" in line or "\033" in line for line in lines)
    assert 0 <= float(report.about["seconds"]) < 600
    assert re.fullmatch(r"\d+\.\d\d GB", report.about["peak_memory"])
