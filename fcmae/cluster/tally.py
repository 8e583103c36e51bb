"""How often a job was stopped and how often it crashed: kept beside the run's folder, over all starts of the job."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fcmae.errors import UserError
from fcmae.files import write_text


@dataclass
class Tally:
    """Counts of one job, told apart by who is to blame.

    What counts for the limits is in vain: nothing newer was saved since. A job that goes on, however slowly, may be
    preempted as often as the cluster likes.

    Attributes:
        starts: of the job.
        preemptions: starts that were stopped from outside.
        crashes: starts that ended by themselves, before their time.
        preemptions_in_vain: in a row, with nothing saved.
        crashes_in_vain: likewise.
        step: the newest that this job has saved; -1 before the first.
        running: the last start has no end yet; seen at the next start, it was ended without a word.
    """

    starts: int = 0
    preemptions: int = 0
    crashes: int = 0
    preemptions_in_vain: int = 0
    crashes_in_vain: int = 0
    step: int = -1
    running: bool = False

    @classmethod
    def read(cls, file: Path) -> "Tally":
        """The counts so far; none yet if there is no such file, or none that can be understood."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, file: Path) -> None:
        """Keeps the counts for the next start.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run's parent folder {file.parent}: {error.strerror}; name another with run_dir=..."
            ) from error
        write_text(file, json.dumps(asdict(self)) + "\n")

    def start(self) -> None:
        """Another start begins."""
        self.starts += 1
        self.running = True

    def end(self, *, crashed: bool, step: int) -> None:
        """The start has ended too early.

        Args:
            crashed: by itself, not from outside.
            step: the newest that this job has saved; -1 for none.
        """
        self.running = False
        if step > self.step:
            self.step = step
            self.preemptions_in_vain = self.crashes_in_vain = 0
        if crashed:
            self.crashes += 1
            self.crashes_in_vain += 1
        else:
            self.preemptions += 1
            self.preemptions_in_vain += 1

    def __str__(self) -> str:
        return f"starts: {self.starts}, preemptions: {self.preemptions}, crashes: {self.crashes}"
