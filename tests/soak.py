"""Every command under faults, again and again: ``python tests/soak.py --minutes N``.

Each command is run once undisturbed. Then it is run again and again, and disturbed: killed, asked to end, its disk
full, its memory limited, its clock set, a bit of its checkpoint changed, a second run started beside it. It is started
again until it ends, and what it wrote must be what the undisturbed run wrote, to the bit. Of ``tune``, which measures
times, the races must be the same, and its files whole or absent after each fault.

First single bits of the undisturbed runs' files are changed, one at a time: each change must be refused. Between the
rounds one process trains and attacks everything in turn; its memory must not grow.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Template

from purify_fast import __version__
from purify_fast._files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "soak.md"
PURIFY = [sys.executable, "-m", "purify_fast"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PURIFY[1:]]
#: In a command's words, the folder that it writes to.
OUT = "<out>"
#: Facts that differ from run to run without being a result; what a process attacked for its bank and read among them.
NO_RESULTS = ("seconds", "images_per_second", "peak_memory", "date", "bank")
FAST = ["--checkpoint-seconds", "0.2", "--device", "cpu"]
#: Seconds after which a process has begun with its work.
BEGIN = 3.0
#: Single bits that are changed, of all files together.
BITS = 240
UNLIMITED = resource.RLIM_INFINITY
#: The ops that `tune` races here: a few seconds of races.
RACED = ("sample_latent", "reconstruction_loss", "noisy_replay")


@dataclass(frozen=True)
class Command:
    """The disturbed commands."""

    name: str
    words: tuple[str, ...]
    out: str = "--out"
    program: tuple[str, ...] = tuple(PURIFY)

    def every_word(self, out: Path) -> list[str]:
        """The words of one run that writes to ``out``."""
        words = [word.replace(OUT, str(out)) for word in self.words]
        return [*words, self.out, str(out)] if self.out else words


def commands(data: Path, inputs: Path) -> list[Command]:
    """The commands, small; each may use what the undisturbed runs of those before it left in ``inputs``."""
    images = ("--data", str(data))
    base = ("--classifier", str(inputs / "train classifier"))
    attack = ("--eps", "0.1", "--steps", "2")
    few = ("--protocol", "fast", "--images", "12", "--steps", "4", "--eot-iter", "2")
    carso = ("--layers", "conv2", "--cond-dim", "8", "--latent-dim", "4", "--samples", "2", "--decoder-width", "2")
    # a bank in the caches would have what other runs attacked
    bank = ("--bank", "4", "--bank-refresh", "0.2", "--bank-folder", f"{OUT}/bank")
    atop = ("train", "atop", *base, *images, "--init", str(inputs / "train generator"), "--eps", "0.1")
    return [
        Command("train classifier", ("train", "classifier", *images, "--width", "4", "--epochs", "16", *attack, *FAST)),
        Command("train carso", ("train", "carso", *base, *images, *carso, "--epochs", "10", *attack, *FAST)),
        Command(
            "train carso, bank", ("train", "carso", *base, *images, *carso, "--epochs", "10", *attack, *FAST, *bank)
        ),
        Command(
            "train generator",
            ("train", "generator", *base, *images, "--width", "2", "--epochs", "2", "--batch-size", "32", *FAST),
        ),
        Command("train atop", (*atop, "--cls-delay", "1", "--epochs", "3", "--batch-size", "32", *FAST)),
        Command("train arrest", ("train", "arrest", *base, *images, "--epochs", "10", *attack, *FAST)),
        Command("evaluate", ("evaluate", str(inputs / "train carso"), *images, "--device", "cpu", *few)),
        Command(
            "evaluate, 2 processes",
            ("evaluate", str(inputs / "train carso"), *images, "--device", "cpu", *few, "--batch-size", "2"),
            program=tuple(TORCHRUN),
        ),
        Command("tune", ("tune", "--device", "cpu", "--ops", *RACED, "--minutes", "10"), out=""),
    ]


def make_data(path: Path) -> None:
    """Images of 10 classes, 16 x 16, that can be learned in seconds."""
    import numpy as np

    state = np.random.RandomState(0)

    def split(n: int):
        y = np.arange(n) % 10
        x = state.randint(0, 80, (n, 16, 16))
        for image, label in zip(x, y, strict=True):
            image[label : label + 6, 3 : 3 + label] += 150
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = split(480), split(60)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)


# -- one run and its results -------------------------------------------------------------------------------------------


def environment(cache: Path) -> dict[str, str]:
    """One thread, and verdicts on kernels that are this soak's own: another race beside it changes nothing."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "PURIFY_FAST_CACHE": str(cache),
    }


def start(command: Command, out: Path, cache: Path) -> subprocess.Popen:
    words = [*command.program, *command.every_word(out)]
    # no file, which a full disk would cut off too
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(cache if command.out else out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.said = []  # type: ignore[attr-defined]
    # a pipe that nobody empties would stop the process
    process.reader = threading.Thread(target=lambda: process.said.extend(process.stderr), daemon=True)  # type: ignore
    process.reader.start()  # type: ignore[attr-defined]
    return process


def ended(process: subprocess.Popen, timeout: float = 900.0) -> tuple[int, str]:
    """Its exit status and what it wrote to stderr; processes that it started are gone with it."""
    try:
        code = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.reader.join(30)  # type: ignore[attr-defined]
    return code, "".join(process.said)  # type: ignore[attr-defined]


def plain(value: object) -> object:
    """A JSON value without the facts that are no results."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not any(word in k for word in NO_RESULTS)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def results(command: Command, out: Path) -> dict[str, object]:
    """The outcome of a run, by file: models to the bit, logs, tables and reports without times; of `tune` the races."""
    found: dict[str, object] = {}
    if not command.out:
        (path,) = out.glob("kernels-*.json")
        raced = json.loads(path.read_text())["ops"]
        names = ("example", "variant", "dtype", "size", "style", "elements")
        return {
            op: sorted([str(row[name]) for name in names] for row in raced[op]["rows"])
            for op in sorted(raced)
            if "rows" in raced[op]
        }
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        # rows are named by what they depend on, and the files that lead to a result are none
        if path.name.startswith((".", "checkpoint")) or "rows/" in name or not path.is_file():
            continue
        if path.name == "model.safetensors":
            found[name] = path.read_bytes()
        elif path.name == "log.jsonl":
            found[name] = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "report.json":
            found[name] = plain(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            found[name] = path.read_text()
    return found


# -- faults ------------------------------------------------------------------------------------------------------------


def change_bit(path: Path, draw: random.Random) -> tuple[bytes, int]:
    """Change one bit of a file, anywhere; what was in it, and which bit it is."""
    whole = path.read_bytes()
    at = draw.randrange(8 * len(whole))
    data = bytearray(whole)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    return whole, at


class Soak:
    """One soak, and what happened in it."""

    def __init__(self, folder: Path, seed: int, only: list[str]):
        self.folder, self.draw = folder, random.Random(seed)
        self.inputs, self.cache = folder / "undisturbed", folder / "cache"
        self.counts, self.ends = Counter[tuple[str, str]](), Counter[tuple[str, int]]()
        self.rounds, self.bits = Counter[str](), Counter[str]()
        self.losses, self.memory, self.worked = list[str](), list[int](), 0.0
        self.seconds, self.wanted = dict[str, float](), dict[str, dict[str, object]]()
        make_data(folder / "data.npz")
        every = commands(folder / "data.npz", self.inputs)
        unknown = set(only) - {command.name for command in every}
        if unknown:
            raise ValueError(f"no such command: {', '.join(unknown)}; there are {[c.name for c in every]}")
        self.commands = [c for c in every if not only or c.name in only]
        self.needed = [c for c in every if c in self.commands or c.name.startswith("train ")]
        self.faults: dict[str, Callable[[Command, Path], None]] = {
            "SIGKILL": self.killed,
            "one of the processes killed": self.one_killed,
            "SIGTERM": self.terminated,
            "full disk": self.full_disk,
            "small tmpfs": self.small_disk,
            "memory limit": self.little_memory,
            "clock set": self.clock,
            "changed bit": self.bit,
            "second run": self.second,
        }

    def say(self, text: str) -> None:
        print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)

    def lost(self, text: str) -> None:
        self.losses.append(text)
        self.say(f"LOSS: {text}")

    def undisturbed(self) -> None:
        """Run every command once, and remember what it came to and how long it took."""
        for command in self.needed:
            began = time.monotonic()
            out = self.inputs / command.name
            # several processes are to find what one finds
            alone = replace(command, program=tuple(PURIFY)) if command.program == tuple(TORCHRUN) else command
            code, errors = ended(start(alone, out, self.cache))
            if code:
                raise RuntimeError(f"{command.name} undisturbed: exit status {code}\n{errors[-3000:]}")
            self.seconds[command.name] = time.monotonic() - began
            self.wanted[command.name] = results(command, out)
            self.say(f"{command.name} undisturbed: {self.seconds[command.name]:.1f} s")

    def flip(self) -> None:
        """Change single bits anywhere in checkpoints and saved models, one at a time, and count what is refused."""
        # PyTorch takes seconds to import, and the processes that are started from here do it themselves
        from purify_fast.training.checkpoint import CHECKPOINT, MODEL, PREVIOUS, last_checkpoint, read_model, read_tree

        # it tells of each changed file
        logging.getLogger("purify_fast").setLevel(logging.ERROR)
        folders = [self.inputs / command.name for command in self.needed if command.name.startswith("train ")]
        for number in range(BITS):
            folder = folders[number % len(folders)]
            path = folder / (CHECKPOINT, MODEL)[number // len(folders) % 2]
            whole, at = change_bit(path, self.draw)
            self.bits["changed"] += 1
            try:
                read_tree(path) if path.name == CHECKPOINT else read_model(folder)
                self.lost(f"bit {at} of {path.relative_to(self.inputs)} changed, and the file was read")
            except ValueError:
                self.bits["refused"] += 1
            if path.name == CHECKPOINT and (folder / PREVIOUS).is_file():
                self.bits["had one before"] += 1
                taken = last_checkpoint(folder)["step"] == read_tree(folder / PREVIOUS)["step"]
                self.bits["the one before taken"] += taken
            path.write_bytes(whole)
        self.say(", ".join(f"{number} {what}" for what, number in self.bits.items()))

    def round(self, command: Command) -> None:
        """Disturb a command until it has had some faults, let it end, and compare."""
        out = self.folder / "disturbed"
        shutil.rmtree(out, ignore_errors=True)
        kinds = [kind for kind in self.faults if self.applies(kind, command)]
        # a kill is what happens most
        kills = ["SIGKILL"] * self.draw.randint(2, 5)
        chosen = [*kills, *(self.draw.choice(kinds) for _ in range(self.draw.randint(0, 2)))]
        self.draw.shuffle(chosen)
        self.worked = 0.0
        for kind in chosen:
            self.faults[kind](command, out)
            if not command.out:
                self.check_whole(out, kind)
        code, errors = ended(start(command, out, self.cache))
        if code:
            self.lost(f"{command.name} after {', '.join(chosen)}: exit status {code}: {errors[-400:]}")
            return
        if not command.out:
            self.check_whole(out, "its end")
        found = results(command, out)
        wanted = self.wanted[command.name]
        odd = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        if odd:
            self.lost(f"{command.name} after {', '.join(chosen)}: {', '.join(odd)} differ")
        self.rounds[command.name] += 1
        self.say(f"{command.name}: {', '.join(chosen)}: {'DIFFERENT' if odd else 'the same'}")

    def check_whole(self, cache: Path, after: str) -> None:
        """What `tune` left is whole or absent."""
        for path in cache.glob("*.json"):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                self.lost(f"tune after {after}: {path.name} is not whole: {error}")

    def applies(self, kind: str, command: Command) -> bool:
        """Tell whether a fault can happen to a command: not all write checkpoints."""
        if command.program == tuple(TORCHRUN):
            return kind in ("SIGKILL", "one of the processes killed")
        if kind == "one of the processes killed":
            return False
        if kind == "changed bit":
            return command.name.startswith("train ")
        if kind == "small tmpfs":
            return command.name == "train classifier" and namespaces()
        return kind != "clock set" or command.program == tuple(PURIFY)

    def disturb(
        self,
        kind: str,
        command: Command,
        out: Path,
        act: Callable[[subprocess.Popen], object],
        codes: tuple[int, ...] | None,
    ) -> tuple[int, str]:
        """Start a command, act at a random moment if it has not ended by itself, and wait for its end.

        It must end with one of these exit statuses if any are given, and without a traceback where it ends by itself.
        """
        process, began = start(command, out, self.cache), time.monotonic()
        # a quarter of the faults come before the work begins, the others into what is left
        begin = min(BEGIN, 0.5 * self.seconds[command.name])
        moment = self.draw.uniform(0.05, begin)
        if self.draw.random() >= 0.25:
            moment = begin + self.draw.uniform(0.02, 1) * max(self.seconds[command.name] - begin - self.worked, 0.5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        # what it has done by now is not done again
        self.worked += max(time.monotonic() - began - BEGIN, 0.0)
        disturbed = process.poll() is None
        if disturbed:
            act(process)
            self.counts[command.name, kind] += 1
        code, errors = ended(process)
        if disturbed:
            self.ends[kind, code] += 1
        if codes is not None and (code not in codes or ("Traceback" in errors and code >= 0)):
            self.lost(f"{command.name} under {kind} ended with {code}: {errors[-600:]}")
        return code, errors

    def killed(self, command: Command, out: Path) -> None:
        # with all processes that it started, as when a machine fails
        self.disturb("SIGKILL", command, out, kill_all, (-9, 0))

    def one_killed(self, command: Command, out: Path) -> None:
        """torchrun ends the others, or the first process goes on without it: that is a race between the two."""

        def kill_one(process: subprocess.Popen) -> None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self.draw.choice(children(process.pid)), signal.SIGKILL)

        self.disturb("one of the processes killed", command, out, kill_one, None)

    def terminated(self, command: Command, out: Path) -> None:
        self.disturb("SIGTERM", command, out, lambda process: process.terminate(), (-15, 143, 0))

    def full_disk(self, command: Command, out: Path) -> None:
        """From a random moment on, no file can be written that is larger than a few bytes."""
        code, errors = self.disturb("full disk", command, out, fill_disk, (0, 2))
        if code == 2 and str(out) not in errors:
            self.lost(f"{command.name} on a full disk names no file: {errors[-400:]}")

    def small_disk(self, command: Command, out: Path) -> None:
        """On a disk of 60 KiB, which has no room for two checkpoints; then the disk grows."""
        out.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"'{word}'" for word in [*command.program, *command.words, command.out])
        script = (
            f"mkdir -p /tmp/soak-$$ && mount -t tmpfs -o size=60k none /tmp/soak-$$ || exit 77; "
            f"{words} /tmp/soak-$$/run; code=$?; cp -r /tmp/soak-$$/run/. '{out}'; umount /tmp/soak-$$; "
            f"rmdir /tmp/soak-$$; exit $code"
        )
        errors = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            cwd=ROOT,
            env=environment(self.cache),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in out.rglob(".purify_fast.*"):
            path.unlink()
        self.counts[command.name, "small tmpfs"] += 1
        self.ends["small tmpfs", errors.returncode] += 1
        if errors.returncode != 2 or "cannot be written, its disk has" not in errors.stderr:
            self.lost(f"{command.name} on a small disk: {errors.returncode}: {errors.stderr[-400:]}")

    def little_memory(self, command: Command, out: Path) -> None:
        """From a random moment on, hardly any memory can be had; how a process ends then is not its choice."""

        def limit(process: subprocess.Popen) -> None:
            with contextlib.suppress(OSError, IndexError):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
                room = pages * resource.getpagesize() + self.draw.choice((0, 2**18, 2**21))
                resource.prlimit(process.pid, resource.RLIMIT_AS, (room, UNLIMITED))

        self.disturb("memory limit", command, out, limit, None)

    def clock(self, command: Command, out: Path) -> None:
        """A run whose clock jumps by days at every look, killed at a random moment; its files get times of any year."""
        jumping = replace(command, program=(sys.executable, __file__, "clock"))
        self.disturb("clock set", jumping, out, kill_all, (-9, 0))
        for path in out.rglob("*"):
            if path.is_file():
                moment = self.draw.uniform(0, 2**32)
                os.utime(path, (moment, moment))

    def bit(self, command: Command, out: Path) -> None:
        """One bit of the last checkpoint changes after a kill: refused, or the checkpoint before it is taken."""
        self.killed(command, out)
        path = out / "checkpoint.safetensors"
        if not path.is_file():
            return
        whole, at = change_bit(path, self.draw)
        before = (out / "checkpoint.previous.safetensors").is_file()
        code, errors = ended(start(command, out, self.cache))
        self.counts[command.name, "changed bit"] += 1
        self.ends["changed bit", code] += 1
        said, status = ("was renamed to", 0) if before else ("is not a checkpoint", 2)
        if code != status or said not in errors:
            self.lost(f"{command.name}: bit {at} changed, with one before it: {before}: {code}: {errors[-400:]}")
        if not before:
            path.write_bytes(whole)

    def second(self, command: Command, out: Path) -> None:
        """Another run of the same folder, at a random moment: refused while the first is at work."""
        seen: list[tuple[int, str]] = []

        def another(process: subprocess.Popen) -> None:
            if any(out.rglob(".purify_fast.lock")):
                seen.append(ended(start(command, out, self.cache)))

        self.disturb("second run", command, out, another, (0, 2))
        # the first may have ended while the second one started
        for code, errors in seen:
            if code == 2 and "is in use by another run" not in errors:
                self.lost(f"{command.name}: a second run was refused for another reason: {errors[-400:]}")
            self.ends["second run, itself", code] += 1


def children(pid: int) -> list[int]:
    """The processes that a process started and that have not ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process with all that it started; those of torchrun are in groups of their own."""
    for child in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def fill_disk(process: subprocess.Popen) -> None:
    """From now on a process can write no file that is larger than 100 bytes."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, UNLIMITED))


def namespaces() -> bool:
    """Tell whether a small disk can be mounted here without being root."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    )


# -- a process that trains and attacks all the time --------------------------------------------------------------------


def cycle(folder: Path) -> int:
    """One training and one evaluation of each kind in this process; its resident bytes afterwards."""
    import torch

    from purify_fast import cli

    torch.set_num_threads(1)
    inputs = folder / "steady inputs"
    for command in commands(folder / "data.npz", inputs):
        if command.name in ("tune", "evaluate, 2 processes"):
            continue
        out = inputs / command.name
        if command.name != "evaluate":
            shutil.rmtree(out, ignore_errors=True)
        # few epochs, since it is the number of calls that matters; in fewer, CARSO's KL term would never act
        words = command.every_word(out)
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "4"
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            code = cli.main(words)
        if code:
            raise RuntimeError(f"{command.name}: {code}")
        if command.name == "evaluate":
            shutil.rmtree(out, ignore_errors=True)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(folder: Path) -> int:
    """Do a `cycle` for each line that comes in, and print the resident bytes after it."""
    for _ in sys.stdin:
        print(cycle(folder), flush=True)
    return 0


@contextlib.contextmanager
def steady(folder: Path) -> Iterator[Callable[[], int]]:
    """Within the block, a process that does a `cycle` whenever it is asked, and tells its resident bytes."""
    words = [sys.executable, __file__, "steady", str(folder)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(folder / "cache"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None

    def ask() -> int:
        process.stdin.write("go\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(60)


def with_jumping_clock(words: list[str]) -> int:
    """The command line, with a clock that jumps by up to 30 days, back and forth, at every look."""
    from purify_fast import cli

    real, draw = time.time, random.Random(os.getpid())
    time.time = lambda: real() + draw.uniform(-2.6e6, 2.6e6)  # type: ignore[assignment]
    return cli.main(words)


# -- the report --------------------------------------------------------------------------------------------------------


def growth(memory: list[int]) -> float:
    """By how much resident memory grew, as a share: the last third against the second, both after a warm-up."""
    third = len(memory) // 3
    if third < 1:
        return 0.0
    return statistics.median(memory[-third:]) / statistics.median(memory[third:-third] or memory) - 1


def page(soak: Soak, minutes: float) -> str:
    """The report as Markdown."""
    sums = Counter[str]()
    for (_, kind), number in soak.counts.items():
        sums[kind] += number
    facts = {"version": __version__, "machine": platform.machine(), "python": platform.python_version()}
    facts |= {"date": datetime.date.today().isoformat(), "minutes": round(minutes), "raced": RACED}
    text = Path(__file__).with_suffix(".jinja").read_text()
    return Template(text).render(soak=soak, sums=sums, growth=growth(soak.memory), **facts)


def main(minutes: float, out: Path, seed: int, only: list[str], folder: Path | None) -> bool:
    """Soak for so many minutes, the undisturbed runs not counted, and write the report; whether nothing was lost."""
    with tempfile.TemporaryDirectory(prefix="soak-", dir=folder) as place:
        soak = Soak(Path(place), seed, only)
        soak.undisturbed()
        soak.flip()
        until = time.monotonic() + 60 * minutes
        with steady(Path(place)) as ask:
            # each command has the same share of the time, so that one that takes long has its turn less often
            spent = {command.name: 0.0 for command in soak.commands}
            while time.monotonic() < until:
                for _ in soak.commands:
                    # the short ones first, so that a short soak has as many of them as it can
                    command = min(soak.commands, key=lambda one: (spent[one.name], soak.seconds[one.name]))
                    began = time.monotonic()
                    # every command is disturbed once, however busy the machine is
                    if began < until or not soak.rounds[command.name]:
                        soak.round(command)
                    spent[command.name] += time.monotonic() - began
                soak.memory.append(ask())
                write_text(out, page(soak, minutes))
        if growth(soak.memory) > 0.03:
            soak.lost(f"resident memory grew by {100 * growth(soak.memory):.1f} %: {soak.memory}")
        write_text(out, page(soak, minutes))
        print(page(soak, minutes))
    return not soak.losses


#: Functions of the processes that a soak starts, by their first word.
PARTS: dict[str, Callable[[list[str]], int]] = {
    "clock": with_jumping_clock,
    "steady": lambda words: work(Path(words[0])),
}


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in PARTS:
        sys.exit(PARTS[sys.argv[1]](sys.argv[2:]))
    parser = argparse.ArgumentParser(
        description="every command under faults: kills, full disks, changed bits and others"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long; 30 by default")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="COMMAND", help="such as 'train carso'; all by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults' kinds and moments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the report; benchmarks/results/soak.md by default")
    parser.add_argument("--folder", type=Path, help="where its files are kept meanwhile; the system's own by default")
    options = parser.parse_args()
    sys.exit(not main(options.minutes, options.out, options.seed, options.only, options.folder))
