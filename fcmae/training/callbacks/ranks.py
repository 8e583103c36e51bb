"""What several ranks owe each other: to be set up alike, to agree before each batch, to say why they end."""

import os
import re
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import lightning as L
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fcmae.errors import RanksLostError, TransientError, UserError, in_a_line
from fcmae.training.agreement import Agreement, RunInterrupted
from fcmae.training.heartbeats import HUNG, LOST, Fault, Heartbeats, hostname
from fcmae.training.journal import Journal
from fcmae.training.launching import MICRO_BATCH, adopt_children

T = TypeVar("T")


class Ranks(L.Callback):
    """Opens the ranks' agreement, compares how they were started, and finds out why one of them fails.

    Args:
        agreement: that batches are taken under.
        facts: what must be the same on all ranks, by its name.
        timeout: seconds after which a rank that does not answer counts as lost.
        journal: of the run.

    Attributes:
        fault: what to say when the run ends because of other ranks; None if it does not.
    """

    def __init__(
        self, *, agreement: Agreement, facts: Callable[[], Mapping[str, str]], timeout: float, journal: Journal
    ) -> None:
        self.agreement = agreement
        self.facts = facts
        self.timeout = timeout
        self.journal = journal
        self.fault: RanksLostError | UserError | None = None
        self._heartbeats: Heartbeats | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._failed = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.agreement.request.hold()
        if trainer.world_size == 1 or self._heartbeats is not None:
            return
        self._children = adopt_children(trainer)
        self.agreement.open(timedelta(seconds=self.timeout))
        everywhere = self.agreement.gather((hostname(), dict(self.facts()), uuid.uuid4().hex))
        check_same([(host, facts) for host, facts, _ in everywhere])
        self._heartbeats = Heartbeats(
            [host for host, *_ in everywhere],
            step=trainer.global_step,
            run=everywhere[0][2],
            leave=lambda faults: self._leave(self._told(faults)),
        )
        self._heartbeats.start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.journal.started(step=trainer.global_step, world_size=trainer.world_size)
        if trainer.world_size > 1:  # until here ranks have waited for each other longer: nodes start when they can
            set_timeout(timedelta(seconds=self.timeout))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._heartbeats is not None:
            self._heartbeats.step = trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._failed or isinstance(exception, RunInterrupted | KeyboardInterrupt | SystemExit):
            return
        self._failed = True
        rank, sure = trainer.global_rank, isinstance(exception, UserError)
        refused = sure and not isinstance(exception, TransientError)
        own = Fault(rank, hostname(), trainer.global_step, in_a_line(exception), refused)
        faults, first = [own], rank == 0  # until the ranks are connected, what one refuses all do
        if self._heartbeats is not None:
            ended = [rank + i for i, child in enumerate(self._children, start=1) if child.poll() is not None]
            timed_out = re.search("time(d ?)?out", str(exception), re.IGNORECASE) is not None
            faults, first = self._heartbeats.judge(own, sure=sure, timed_out=timed_out, ended=ended)
        if first:
            self._note(faults, rank)
        if not sure and rank not in [fault.rank for fault in faults]:
            self.fault = self._told(faults)
        if self._heartbeats is not None:
            self._heartbeats.linger()
        if trainer.world_size > 1 and not sure and trainer.strategy.root_device.type == "cuda":
            # What ends in order waits for the device, which may wait for other ranks.
            if self.fault is None:
                traceback.print_exception(exception)
            self._leave(self.fault or RanksLostError(in_a_line(exception)))

    def from_first(self, make: Callable[[], T]) -> T:
        """See `Heartbeats.from_first`; of a single rank what it makes."""
        return make() if self._heartbeats is None else self._heartbeats.from_first(make)

    def close(self) -> None:
        """Ends what runs in the background."""
        if self._heartbeats is not None:
            self._heartbeats.stop()
        if self._failed:
            self._end_children(15)  # more than it takes them to hear of it

    def _note(self, faults: list[Fault], rank: int) -> None:
        if rank and faults[0].rank == 0:  # the store is gone with rank 0, and nobody knows who else writes this
            time.sleep(min(rank, 50) / 10)
            last = (self.journal.read() or [{}])[-1]
            if (last.get("event"), last.get("rank")) == ("failed", 0):
                return
        for fault in faults:
            self.journal.failed(step=fault.step, rank=fault.rank, host=fault.host, error=fault.error)

    def _told(self, faults: list[Fault]) -> RanksLostError | UserError:
        """What this rank has to say of others' faults."""
        step = self._heartbeats.step if self._heartbeats is not None else 0
        end = f"; rank {dist.get_rank()} on {hostname()} ends at step {step}"
        why = {
            LOST: "killed, stopped, or out of reach",
            HUNG: "it lives, and waits for a disk, a network or its device",
        }
        if faults[0].error in why:
            who = ", ".join(f"rank {one.rank} on {one.host} (last heard of at step {one.step})" for one in faults)
            return RanksLostError(f"{who} {faults[0].error}: {why[faults[0].error]}{end}")
        fault = faults[0]
        told = f"rank {fault.rank} on {fault.host} failed at step {fault.step}: {fault.error}"
        return UserError(told) if fault.refused else RanksLostError(f"{told}{end}")

    def _end_children(self, seconds: float) -> None:
        """Gives them time to end by themselves; one that is stopped would stay for ever."""
        until = time.monotonic() + seconds
        for child in self._children:
            try:
                child.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                child.kill()

    def _leave(self, error: Exception) -> NoReturn:
        sys.stderr.write(f"fcmae: {error}\n")  # in one piece: other ranks write there, too
        sys.stderr.flush()
        self._end_children(15)
        os._exit(2 if isinstance(error, UserError) else 1)


def set_timeout(timeout: timedelta) -> None:
    """Bounds every exchange of all ranks from here on."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # as in torch 2.8, where gloo does not heed it
        distributed_c10d._set_pg_timeout(timeout)


def check_same(everywhere: list[tuple[str, dict[str, str]]]) -> None:
    """Refuses ranks that were not started alike.

    Args:
        everywhere: (host, facts by name) of each rank.

    Raises:
        UserError: names the first fact that differs, and where.
    """
    host, wanted = everywhere[0]
    for rank, (other, facts) in enumerate(everywhere):
        for name, value in wanted.items():
            if facts.get(name) != value:
                fix = "start all ranks from one installation, with one command, on a file system that all of them see"
                if name == MICRO_BATCH:
                    fix = "give it the smaller number instead of auto"
                raise UserError(
                    f"rank {rank} on {other} has another {name} than rank 0 on {host}: {facts.get(name)}, not {value}; "
                    f"{fix}"
                )
