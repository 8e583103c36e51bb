"""One start of a SLURM job: srun from its beginning to its end, and what follows from how it ended.

Standard library only, and nothing of the run but its folder: it works outside of the container that the run is in.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fcmae.cluster.slurm import JobState, requeue
from fcmae.cluster.tally import Tally
from fcmae.stopping import STOPPED
from fcmae.training.journal import Journal

REFUSED, INTERRUPTED = 2, 130
"""The run's other exit codes that do not mean a crash; the job ends with the run's code."""


class Signals:
    """Notes what asks this process to stop, and passes it on to srun.

    As SIGUSR1, which srun hands on to all ranks: it answers SIGTERM by killing them. A second Ctrl-C does that.

    Attributes:
        seen: the signals so far.
    """

    def __init__(self) -> None:
        self.seen: list[signal.Signals] = []
        self._srun: subprocess.Popen[bytes] | None = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        impatient = signum == signal.SIGINT and signum in self.seen
        self.seen.append(signal.Signals(signum))
        if self._srun is not None:
            self._srun.send_signal(signal.SIGTERM if impatient else signal.SIGUSR1)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs srun, out of reach of the terminal's Ctrl-C; returns its exit code, as a shell would."""
        if self.seen:
            return STOPPED
        self._srun = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        if self.seen:  # between the two lines above
            self._srun.send_signal(signal.SIGUSR1)
        code = self._srun.wait()
        self._srun = None
        return code if code >= 0 else 128 - code


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job and the run that it is for.

    Attributes:
        number: SLURM's.
        restarts: how often SLURM has requeued it.
        run_dir: the run's folder.
        max_crashes: crashes in a row, with nothing newer saved in between, after which the job ends.
        max_preemptions: the same for stops from outside.
    """

    number: str
    restarts: int
    run_dir: Path
    max_crashes: int
    max_preemptions: int

    def entries(self) -> list[dict[str, Any]]:
        """What the run's journal says since this job first started it."""
        entries = self._journal()
        starts = [number for number, entry in enumerate(entries) if entry.get("job") == self.number]
        return entries[starts[0] :] if starts else []

    def run(self, command: Sequence[str], environment: Mapping[str, str], signals: Signals) -> int:
        """Starts srun, waits for its end and acts on it.

        Args:
            command: srun's.
            environment: srun's.
            signals: that this process has received, and will.

        Returns:
            The exit code of the job.

        Raises:
            UserError: nothing can be written beside the run's folder.
        """
        refused = self._beside("refused")
        tally = Tally.read(self._beside("json")) if self.restarts else Tally()
        if tally.running:  # the last start ended without a word, as when the node of the batch script fails
            tally.end(crashed=False, step=self._step())
        tally.start()
        tally.write(self._beside("json"))
        refused.unlink(missing_ok=True)
        before, step = self._journal(), self._step()
        say(f"job {self.number}, start {tally.starts}: {self.run_dir}" + (f" from step {step}" if step >= 0 else ""))
        code = signals.run(command, {**environment, "FCMAE_REFUSED": str(refused.absolute())})
        after = self._journal()
        news = after[len(before) :] if after[: len(before)] == before else after  # else the old run was set aside
        try:
            return self._conclude(tally, code, news, signals)
        finally:
            refused.unlink(missing_ok=True)

    def _conclude(self, tally: Tally, code: int, news: list[dict[str, Any]], signals: Signals) -> int:
        refused = self._beside("refused")
        stops = [entry["signal"] for entry in news if entry["event"] == "stopped"]
        if code == 0:
            return self._end(f"{_not_done(news)}; {tally}" if stops else f"done; {tally}", 0)
        if code == REFUSED or refused.is_file():
            why = refused.read_text(encoding="utf-8").strip() if refused.is_file() else "see above"
            return self._end(f"refused, so it is not requeued: {why}", REFUSED)
        if signal.SIGINT in signals.seen:
            return self._end("interrupted; the same command goes on", INTERRUPTED)

        state = JobState.of(self.number)
        late = state.reason == "TimeLimit"
        requeued = state.restarts > self.restarts  # by SLURM: a node failed, or a preemption without a period of grace
        if state.name != "RUNNING" and not late and not requeued:
            return self._end("SLURM ends the job, so it is not requeued; the same sbatch line goes on", STOPPED)

        by = "the time limit" if late else next(iter([*stops, *(one.name for one in signals.seen)]), "SLURM")
        stopped = bool(stops or signals.seen or late or requeued or code == STOPPED)
        tally.end(crashed=not stopped, step=self._step())
        tally.write(self._beside("json"))
        what = f"stopped by {by}" if stopped else f"crashed, exit code {code}{_blame(news)}"
        what += f"; {f'saved is step {tally.step}' if tally.step >= 0 else 'nothing is saved yet'}"
        if requeued:
            say(f"{what}; SLURM itself requeues the job; {tally}")
            return STOPPED
        return self._again(tally, what, stopped=stopped, code=code)

    def _again(self, tally: Tally, what: str, *, stopped: bool, code: int) -> int:
        """Requeues the job, unless that was in vain too often."""
        in_vain = tally.preemptions_in_vain if stopped else tally.crashes_in_vain
        if in_vain >= (self.max_preemptions if stopped else self.max_crashes):
            kind = "stops" if stopped else "crashes"
            return self._end(f"{what}; given up after {in_vain} {kind} with nothing newer saved; {tally}", code)
        say(f"{what}; requeueing; {tally}")
        refusal = requeue(self.number)
        if refusal:
            return self._end(f"SLURM does not requeue it ({refusal}); the same sbatch line goes on", STOPPED)
        return STOPPED

    def _end(self, what: str, code: int) -> int:
        """The job's last word."""
        say(f"{self.run_dir}: {what}")
        self._beside("json").unlink(missing_ok=True)
        return code

    def _beside(self, suffix: str) -> Path:
        """A file of this job beside the run's folder, which a run may set aside."""
        return self.run_dir.with_name(f"{self.run_dir.name}.job{self.number}.{suffix}")

    def _journal(self) -> list[dict[str, Any]]:
        return Journal(self.run_dir / "journal.jsonl").read()

    def _step(self) -> int:
        """The newest step that this job has saved; -1 for none."""
        return max((entry["step"] for entry in self.entries() if entry["event"] == "saved"), default=-1)


def say(line: str) -> None:
    """Adds a line to the job's log, among those of srun and the run."""
    print(f"fcmae.job {time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)  # noqa: T201


def _not_done(news: list[dict[str, Any]]) -> str:
    """Of a run that ended well, but before its last step."""
    stop = [entry for entry in news if entry["event"] == "stopped"][-1]
    return (
        f"not done: {stop['signal']} ended the run at step {stop['step']}, which is saved, and would again; raise it "
        "(trainer.max_time) in the same sbatch line to go on"
    )


def _blame(news: list[dict[str, Any]]) -> str:
    """Who failed first, as far as the journal knows; srun names processes too, in the lines above."""
    failures = [entry for entry in news if entry["event"] == "failed"]
    if not failures:
        return ""
    first = failures[0]
    return f" (rank {first['rank']} on {first['host']} at step {first['step']}: {first['error']})"
