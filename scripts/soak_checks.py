"""What must be true of the run that soak.py disturbs: of each start's end, of its journal, of its last weights."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY = 20  # steps between the checkpoints of the run
STOPS = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}  # what asks the run to stop, and its exit code then
KINDS = [*STOPS, "SIGKILL", "SIGSTOP"]


@dataclass
class Disturbance:
    """What was done to a start, and what came of it.

    Attributes:
        kind: the signal.
        ranks: that got it.
        ready: they took signals already; a process without a handler, which has just begun, dies of them.
        code: exit code of the first rank.
        journal: what the start wrote there, (event, step); of "saved" the last alone.
        wrong: what should not have been.
    """

    kind: str
    ranks: list[int]
    ready: bool
    code: int | None = None
    journal: list[tuple[str, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def judge(done: Disturbance) -> Iterator[str]:
    """What is wrong about how a start ended."""
    steps = dict(done.journal)
    began, ends = "started" in steps, [event for event, _ in done.journal if event not in ("started", "saved")]
    if done.kind in STOPS:
        good = {STOPS[done.kind]}
        if not done.ready:  # nothing was to be saved yet
            good |= {1, 75, -getattr(signal, done.kind), -signal.SIGKILL}
        elif began and ends != ["stopped"]:
            yield f"it was asked to stop, and its journal ends with {ends}"
        saved = steps.get("saved", steps.get("started"))
        if "stopped" in steps and saved not in (None, steps["stopped"]):
            yield f"it stopped at step {steps['stopped']}, and step {saved} is saved"
    else:
        # Until the ranks are connected, Lightning's launcher kills the first one when another ends.
        good = {-signal.SIGKILL} if 0 in done.ranks else {1} if began else {1, -signal.SIGKILL}
        if "stopped" in ends:
            yield "it was killed, and its journal says that it was stopped"
        if began and len(done.ranks) == 1 and "failed" not in ends:
            yield "no line of its journal says which rank was lost"
    if done.code not in good:
        yield f"its exit code is {done.code}, not {' or '.join(map(str, sorted(good)))}"
    if "finished" in ends:
        yield "it finished: give more --epochs"


def lost(entries: list[dict[str, Any]]) -> Iterator[str]:
    """Starts that did not go on from where the one before them had come.

    After a stop that is the step at which it stopped. After a kill it is the last checkpoint, which the journal may not
    know yet if the kill came just between the two.
    """
    saved, unnoted = 0, SAVE_EVERY
    for number, entry in enumerate(entries, start=1):
        if entry["event"] == "started" and not saved <= entry["step"] <= saved + unnoted:
            yield f"line {number} of the journal: a start goes on from step {entry['step']}, saved was step {saved}"
        if entry["event"] in ("started", "saved", "stopped"):
            saved, unnoted = entry["step"], 0 if entry["event"] == "stopped" else SAVE_EVERY


def differences(run: Path, reference: Path) -> Iterator[str]:
    """What differs between the ends of two runs."""
    mine, its = (torch.load(one / "checkpoints" / "last.ckpt", weights_only=True) for one in (run, reference))
    for checkpoint, folder in ((mine, run), (its, reference)):
        checkpoint["optimizer"] = flat(checkpoint["optimizer_states"][0]["state"])
        checkpoint["summary.json"] = (folder / "summary.json").read_text()
    for name in ("state_dict", "optimizer"):
        if mine[name].keys() != its[name].keys() or not all(
            torch.equal(mine[name][key], its[name][key]) for key in its[name]
        ):
            yield f"the {name} differs from that of the undisturbed run"
    for name in ("global_step", "lr_schedulers", "summary.json"):
        if mine[name] != its[name]:
            yield f"{name} differs from that of the undisturbed run: {mine[name]}, not {its[name]}"


def flat(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
