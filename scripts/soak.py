"""Kills and signals one run again and again, and compares its end with a run that nothing disturbed.

python scripts/soak.py FOLDER [--disturbances 50] [--epochs 40] [--seed 0]

Two ranks on the CPU train a small network on the embedded digits, with a checkpoint every 20 steps. At random moments,
one in five of them while they still start, one rank or both get SIGTERM, SIGUSR1, SIGINT or SIGKILL, or one is stopped
(SIGSTOP). After each, the same command is typed again. What must be true:

- each start ends with the exit code and the journal's lines that belong to what was done to it, within two minutes, and
  leaves no process behind;
- the next one goes on at the very step at which a signal stopped the run, or no earlier than at the last checkpoint
  that the journal knew when the run was killed;
- in the end weights, moments, schedule and validation equal, bit for bit, those of the same command, undisturbed. So
  every step saw the same images as there: one that is left out or comes twice would move the weights.

Linux only (/proc). FOLDER/soak.json says what happened; exit code 1: something of the above is not true.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from soak_checks import KINDS, SAVE_EVERY, Disturbance, differences, judge, lost

from fcmae.training.journal import Journal

OPTIONS = [
    *("+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", "model.decoder_dim=16"),
    *("model.drop_path_rate=0.1", "data.image_size=64", "data.batch_size=4", "data.num_workers=1", "pictures=0"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "rank_timeout=10"),
    f"save.every_n_steps={SAVE_EVERY}",
]
LONGEST = 120  # seconds that a start may take to begin, and to end


class Run:
    """A run of two ranks, started again and again.

    Args:
        folder: of the run; its output goes to `<folder>.log`.
        epochs: of its training.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self.journal = Journal(folder / "journal.jsonl")
        self.command = [sys.executable, "-m", "fcmae.pretrain", *OPTIONS, f"epochs={epochs}", f"run_dir={folder}"]

    @contextlib.contextmanager
    def start(self) -> Iterator["subprocess.Popen[bytes]"]:
        """Types the command; whatever is left of it afterwards is killed."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            process = subprocess.Popen(self.command, env=environment, stderr=log, stdout=log, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def undisturbed(self) -> Iterator[str]:
        """Lets it go on to its end; what is wrong about that."""
        with self.start() as process:
            code = process.wait(timeout=7200)
        ends = [entry["event"] for entry in self.journal.read()][-1:]
        if code or ends != ["finished"]:
            yield f"a start that was left alone ended with {code}, see {self.log}"


def ranks(first: int) -> list[int]:
    """The processes of the ranks, the first one first; those that read images are not among them."""
    found = [first]
    with contextlib.suppress(OSError):  # one that has just ended
        for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
            if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                found.append(int(child))
    return found


def takes_signals(process: int) -> bool:
    """Whether a process has a handler for SIGTERM, which Python does not bring along, unlike that for SIGINT."""
    with contextlib.suppress(OSError):
        handled = Path(f"/proc/{process}/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(handled, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def disturb(first: int, kind: str, whom: str) -> Disturbance:
    """Sends a signal to the first rank, the last one, or all of the run's processes."""
    alive, signum = ranks(first), getattr(signal, kind)
    hit = {"first": [0], "last": [len(alive) - 1], "all": list(range(len(alive)))}[whom]
    done = Disturbance(kind, hit, ready=all(takes_signals(alive[rank]) for rank in hit))
    if whom == "all":
        os.killpg(first, signum)
    else:
        os.kill(alive[hit[0]], signum)
    return done


def ended(process: "subprocess.Popen[bytes]") -> int:
    """Waits for the first rank and for whatever it has started."""
    code, until = process.wait(timeout=LONGEST), time.monotonic() + LONGEST
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return code
        time.sleep(0.1)
    raise TimeoutError(f"a process outlived the run, which ended with {code}")


def one(run: Run, numbers: random.Random, usual: float) -> tuple[Disturbance, float]:
    """Starts the run and disturbs it; returns how many seconds such a run takes until it trains, too.

    Args:
        run: to start.
        numbers: to draw from.
        usual: seconds that it took before.

    Raises:
        TimeoutError: it does not begin, or does not end.
    """
    kind = numbers.choice(KINDS)
    # An interrupt comes from a terminal to all; who is stopped must be missed by another one, which trains.
    whom = {"SIGINT": "all", "SIGSTOP": "last"}.get(kind) or numbers.choice(["first", "last", "all"])
    early = kind != "SIGSTOP" and numbers.random() < 0.2
    before, begun = len(run.journal.read()), time.monotonic()
    with run.start() as process:
        while not early and not any(entry["event"] == "started" for entry in run.journal.read()[before:]):
            if process.poll() is not None or time.monotonic() > begun + LONGEST:
                raise TimeoutError(f"it does not begin to train, exit code {process.returncode}")
            time.sleep(0.02)
        usual = usual if early else time.monotonic() - begun
        time.sleep(numbers.uniform(0.1, usual if early else 4))
        if process.poll() is not None:
            raise TimeoutError(f"it ended by itself with {process.returncode}; if it has finished, give more --epochs")
        done = disturb(process.pid, kind, whom)
        done.code = ended(process)
    entries = [(entry["event"], entry["step"]) for entry in run.journal.read()[before:]]
    done.journal = [
        pair for n, pair in enumerate(entries) if pair[0] != "saved" or ("saved" not in dict(entries[n + 1 :]))
    ]
    done.wrong += judge(done)
    return done, usual


def soak(run: Run, *, disturbances: int, seed: int) -> tuple[list[Disturbance], list[str]]:
    """Disturbs a run so many times, and lets it finish; returns what was done, and what was wrong."""
    numbers, usual = random.Random(seed), 10.0
    events: list[Disturbance] = []
    wrong: list[str] = []
    for number in range(1, disturbances + 1):
        try:
            done, usual = one(run, numbers, usual)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            wrong.append(f"start {number} of {disturbances}: {error}, see {run.log}")
            break
        events.append(done)
        print(f"{number}/{disturbances}", json.dumps(asdict(done)), flush=True)
        wrong += [f"start {number}, {done.kind}: {what}" for what in done.wrong]
    return events, [*wrong, *run.undisturbed(), *lost(run.journal.read())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--disturbances", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    begun = time.monotonic()
    run, reference = (Run(arguments.folder / name, arguments.epochs) for name in ("disturbed", "reference"))
    events, wrong = soak(run, disturbances=arguments.disturbances, seed=arguments.seed)
    wrong += reference.undisturbed()
    if all((one.folder / "summary.json").is_file() for one in (run, reference)):
        wrong += differences(run.folder, reference.folder)
    minutes = round((time.monotonic() - begun) / 60, 1)
    result = {"disturbances": [asdict(event) for event in events], "wrong": wrong, "minutes": minutes}
    (arguments.folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    early = sum("started" not in dict(event.journal) for event in events)
    print(
        f"{len(events)} disturbances {dict(Counter(event.kind for event in events))}, {early} before the training began"
    )
    print("\n".join(wrong) or f"all as in the undisturbed run, bit for bit; {minutes} minutes")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
