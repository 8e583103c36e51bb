"""Kills and signals one run again and again, and compares its end with a run that nothing disturbed.

python scripts/soak.py FOLDER [--disturbances 50] [--seed 0]

Two ranks on the CPU train a small network on the embedded digits. At random moments, while they start, train, validate
or save, one rank or all of them get SIGTERM, SIGUSR1, SIGINT or SIGKILL, or one is stopped (SIGSTOP). After each, the
same command is typed again. FOLDER/soak.json says what happened. Exit code 1: something was lost.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fcmae.training.journal import Journal

SAVE_EVERY = 100
OPTIONS = [
    *(
        "+model=custom",
        "model.depths=[1,1,1,1]",
        "model.dims=[8,8,16,16]",
        "model.decoder_dim=16",
        "data.image_size=64",
    ),
    *("data.batch_size=4", "data.num_workers=1", "pictures=0", "model.drop_path_rate=0.1", "rank_timeout=10"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"save.every_n_steps={SAVE_EVERY}"),
]
KINDS = ["SIGTERM", "SIGUSR1", "SIGINT", "SIGKILL", "SIGSTOP"]
GOOD_ENDS = {  # exit codes of the first rank, by what was sent to which
    "SIGTERM": {75},
    "SIGUSR1": {75},
    "SIGINT": {130},
    "SIGKILL": {1, -signal.SIGKILL},
    "SIGSTOP": {1},
}


def start(run: Path, epochs: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "fcmae.pretrain", *OPTIONS, f"epochs={epochs}", f"run_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True)


def ranks(first: int, run: Path) -> list[int]:
    """The processes of the ranks, the first one first; those that read images are not among them."""
    found = [first]
    for pid in children(first):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if Path(f"/proc/{pid}").exists() else []
        if b"LOCAL_RANK=1" in words:
            found.append(pid)
    return found


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(process: "subprocess.Popen[bytes]", run: Path, kind: str, whom: str) -> None:
    if whom == "all":
        os.killpg(process.pid, getattr(signal, kind))
        return
    alive = ranks(process.pid, run)
    os.kill(alive[-1] if whom == "last" else alive[0], getattr(signal, kind))


def end(process: "subprocess.Popen[bytes]") -> int:
    """Waits for the first rank, then for whatever it has started."""
    code = process.wait(timeout=120)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return code
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"a process outlived its run by a minute, which ended with {code}")


def soak(folder: Path, *, disturbances: int, epochs: int, seed: int) -> dict[str, Any]:
    numbers, run, journal = random.Random(seed), folder / "disturbed", Journal(folder / "disturbed" / "journal.jsonl")
    events: list[dict[str, Any]] = []
    for number in range(disturbances):
        kind = numbers.choice(KINDS)
        # An interrupt comes from a terminal to all; who is stopped must be seen by another one.
        whom = {"SIGINT": "all", "SIGSTOP": "last"}.get(kind) or numbers.choice(["first", "last", "all"])
        lines, process = len(journal.read()), start(run, epochs)
        early = numbers.random() < 0.2
        if early and kind != "SIGSTOP":  # while it imports, connects, reads its checkpoint
            delay = numbers.uniform(0.1, 6)
        else:
            while not any(entry["event"] == "started" for entry in journal.read()[lines:]):
                assert process.poll() is None, f"start {number} failed, see {run}.log"
                time.sleep(0.05)
            delay = numbers.uniform(2, 8)
        time.sleep(delay)
        if process.poll() is not None:
            break  # finished
        disturb(process, run, kind, whom)
        code = end(process)
        now = journal.read()[lines:]
        began = [entry["step"] for entry in now if entry["event"] == "started"]
        event = {"kind": kind, "whom": whom, "code": code, "started": began[0] if began else None}
        event["stopped"] = next((entry["step"] for entry in now if entry["event"] == "stopped"), None)
        event["saved"] = max((entry["step"] for entry in now if entry["event"] == "saved"), default=None)
        events.append(event)
        print(f"{number + 1}/{disturbances}", json.dumps(event), flush=True)
        assert code in GOOD_ENDS[kind] or not began, event
    process = start(run, epochs)
    assert process.wait(timeout=3600) == 0, f"the last start failed, see {run}.log"
    return {"disturbances": events, "lost": list(lost(journal.read()))}


def lost(entries: list[dict[str, Any]]) -> Any:
    """Starts that did not begin where the one before them had saved."""
    saved = 0
    for entry in entries:
        if entry["event"] == "started" and entry["step"] != saved:
            yield {"saved": saved, **entry}
        if entry["event"] in ("saved", "stopped"):
            saved = entry["step"]


def same_weights(one: Path, other: Path) -> bool:
    mine, its = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other))
    moments, their_moments = (flat(checkpoint["optimizer_states"][0]["state"]) for checkpoint in (mine, its))
    return (
        mine["state_dict"].keys() == its["state_dict"].keys()
        and moments.keys() == their_moments.keys()
        and all(torch.equal(value, its["state_dict"][name]) for name, value in mine["state_dict"].items())
        and all(torch.equal(value, their_moments[name]) for name, value in moments.items())
    )


def flat(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--disturbances", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    begun = time.monotonic()
    result = soak(arguments.folder, disturbances=arguments.disturbances, epochs=arguments.epochs, seed=arguments.seed)
    reference = start(arguments.folder / "reference", arguments.epochs)
    assert reference.wait(timeout=3600) == 0
    result["same_weights"] = same_weights(arguments.folder / "disturbed", arguments.folder / "reference")
    result["minutes"] = round((time.monotonic() - begun) / 60, 1)
    kinds = Counter(event["kind"] for event in result["disturbances"])
    (arguments.folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(result['disturbances'])} disturbances {dict(kinds)}, {len(result['lost'])} starts from another step than"
    )
    print(f"was saved; weights and moments equal to those of an undisturbed run: {result['same_weights']}")
    sys.exit(bool(result["lost"]) or not result["same_weights"])


if __name__ == "__main__":
    main()
