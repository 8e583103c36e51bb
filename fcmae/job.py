"""`python -m fcmae.job pretrain key=value ...`, in a SLURM batch script: one run, over all its starts, to its end.

Starts the verb on all nodes of the job, passes signals on to it, and requeues the job when it was stopped or crashed.
docs/slurm.md tells the whole story. It imports no torch, and starts in a second.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fcmae.cluster.slurm import Allocation
from fcmae.cluster.supervision import REFUSED, Job, Signals
from fcmae.errors import UserError

VERBS = ("pretrain", "finetune")


def main() -> None:
    """Runs the job; what the user can mend is one line, with exit code 2."""
    signals = Signals()  # first, so that no signal goes unnoticed
    try:
        raise SystemExit(supervise(sys.argv[1:], signals))
    except UserError as error:
        print(f"fcmae: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(REFUSED) from None


def supervise(arguments: list[str], signals: Signals) -> int:
    """Checks what was typed, before any node begins, and runs it.

    Args:
        arguments: the verb, and what follows it on its own command line.
        signals: that this process has received, and will.

    Returns:
        The exit code of the job.

    Raises:
        UserError: a mistake in the arguments, or a job that does not fit them.
    """
    verb, *overrides = arguments or [""]
    if verb not in VERBS:
        raise UserError(f"{verb!r} is not one of {', '.join(VERBS)}: python -m fcmae.job pretrain key=value ...")
    allocation = Allocation.of(os.environ)
    config = _compose(verb, overrides)
    job = Job(
        number=allocation.job,
        restarts=allocation.restarts,
        run_dir=Path(config["run_dir"]),
        max_crashes=_whole("FCMAE_MAX_CRASHES", 3),
        max_preemptions=_whole("FCMAE_MAX_PREEMPTIONS", 20),
    )
    geometry = allocation.geometry(config["trainer"], {_key(override) for override in overrides})
    settled = {*geometry, *(["resume"] if job.entries() else [])}  # a requeued run does not start over again
    overrides = [override for override in overrides if _key(override) not in settled]
    overrides += [f"{name}={value}" for name, value in geometry.items()]
    python = shlex.split(os.environ.get("FCMAE_PYTHON", "")) or [sys.executable]
    command = [*allocation.srun(int(geometry["trainer.devices"])), *python, "-m", f"fcmae.{verb}", *overrides]
    return job.run(command, allocation.environment(os.environ), signals)


def _compose(verb: str, overrides: list[str]) -> dict[str, Any]:
    """The configuration of a command line."""
    # These take a while, in which signals are noted already.
    from omegaconf import OmegaConf

    from fcmae.command_line.launch import compose

    for override in overrides:
        if override.startswith("-") or ("=" not in override and not override.startswith("~")):
            raise UserError(f"{override!r} is not key=value; options of sbatch stand before the script")
    config = compose(verb, overrides)
    _check_folder(OmegaConf.to_container(config, resolve=False))
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return plain


def _check_folder(config: Any) -> None:
    for name in ("run_dir", "run_name"):
        if "${now:" in str(config[name]):
            raise UserError(
                f"{name}={config[name]} is another folder after each requeue: use ${{oc.env:SLURM_JOB_ID}} instead of "
                "the time"
            )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _whole(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or value == "0":
        raise UserError(f"{name}={value} must be a whole number from 1")
    return int(value)


if __name__ == "__main__":
    main()
