"""What several ranks owe each other: to be set up alike, to agree before each batch, to say which of them is lost."""

import logging
import subprocess
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fcmae.errors import RanksLostError, UserError
from fcmae.training.agreement import Agreement, RunInterrupted
from fcmae.training.heartbeats import Heartbeats, Silent, hostname
from fcmae.training.journal import Journal
from fcmae.training.launching import adopt_children

log = logging.getLogger(__name__)


class Ranks(L.Callback):
    """Opens the ranks' agreement, compares how they were started, and finds out who is missing when one fails.

    Args:
        agreement: that batches are taken under.
        facts: what must be the same on all ranks, by its name.
        timeout: seconds after which a rank that does not answer counts as lost.
        journal: of the run.

    Attributes:
        lost: what to say of ranks that were found missing; None if none was.
    """

    def __init__(
        self, *, agreement: Agreement, facts: Callable[[], Mapping[str, str]], timeout: float, journal: Journal
    ) -> None:
        self.agreement = agreement
        self.facts = facts
        self.timeout = timeout
        self.journal = journal
        self.lost: RanksLostError | None = None
        self._heartbeats: Heartbeats | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._heartbeats is not None:
            return
        self._children = adopt_children(trainer)
        self.agreement.open(timedelta(seconds=self.timeout))
        everywhere = self.agreement.gather((hostname(), dict(self.facts())))
        check_same(everywhere)
        self._heartbeats = Heartbeats([host for host, _ in everywhere], step=trainer.global_step)
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
        if isinstance(exception, RunInterrupted | KeyboardInterrupt | SystemExit):
            return
        step, rank = trainer.global_step, trainer.global_rank
        silent: list[Silent] = []
        if self._heartbeats is not None and not isinstance(exception, UserError):
            ended = [rank + i for i, child in enumerate(self._children, start=1) if child.poll() is not None]
            silent = [self._heartbeats.of(one) for one in ended] or self._heartbeats.silent()
        if not silent:
            self.journal.failed(step=step, rank=rank, host=hostname(), error=str(exception).splitlines()[0])
            return
        told = f"{', '.join(map(str, silent))} no longer answers: killed, stopped, or out of reach"
        self.lost = RanksLostError(f"{told}; rank {rank} on {hostname()} ends at step {step}")
        if rank == min({*range(trainer.world_size)} - {one.rank for one in silent}):
            for one in silent:
                self.journal.failed(step=one.step, rank=one.rank, host=one.host, error="no longer answers")

    def close(self) -> None:
        """Ends what runs in the background."""
        if self._heartbeats is not None:
            self._heartbeats.stop()
        if self.lost is not None:
            for child in self._children:  # one that is stopped would stay for ever
                child.kill()


def set_timeout(timeout: timedelta) -> None:
    """Bounds every exchange of all ranks from here on."""
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout)
    else:  # torch before 2.10 or so
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
                raise UserError(
                    f"rank {rank} on {other} has another {name} than rank 0 on {host}: {facts.get(name)}, not {value}; "
                    "start all ranks from one installation, with one command, on a file system that all of them see"
                )
