"""The supervisor of a SLURM job, with scripts in the place of srun and scontrol."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fcmae.cluster.slurm import Allocation
from fcmae.cluster.tally import Tally
from fcmae.errors import UserError

ALLOCATED = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
}
SRUN = """#!/usr/bin/env bash
# Notes its arguments and variables, says what the run would, and ends as it would: with $CODE, or when told to.
printf '%s\\n' "$@" >srun.arguments
env >srun.environment
mkdir -p run
trap 'echo USR1 >>srun.signals; STOP=1' USR1
[[ -n ${JOURNAL:-} ]] && printf '%s\\n' "$JOURNAL" >>run/journal.jsonl
[[ -n ${REFUSAL:-} ]] && echo "$REFUSAL" >"$FCMAE_REFUSED"
for ((i = 0; i < 300 && ${WAIT:-0} && ! ${STOP:-0}; i++)); do sleep 0.1; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames"* ]] && { [[ -z ${NAMELESS:-} ]] || { echo "$NAMELESS" >&2; exit 1; }; printf 'n1\\nn2\\n'; }
[[ $* == "show job"* ]] && echo "JobId=42 JobState=${STATE:-RUNNING} Reason=${REASON:-None} Restarts=${RESTARTS:-0}"
[[ $1 == requeue ]] && { echo "$*" >>requeued; [[ -z ${DENIED:-} ]] || { echo "$DENIED" >&2; exit 1; }; }
exit 0
"""
SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMELESS = (
    "the names of the job's nodes are not to be had, {}: see that SLURM's commands work in the batch script, as "
    "`scontrol show hostnames` does on a login node"
)
STARTED = '{"event": "started", "step": 0, "job": "42"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)
    return tmp_path


def begin(folder: Path, *overrides: str, **variables: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fcmae.job", "pretrain", "+model=tiny", "run_dir=run", *overrides]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "FCMAE_"))}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**outside, **ALLOCATED, "PATH": path, **variables}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def job(folder: Path, *overrides: str, **variables: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a job; `requeued` tells whether it asked for that."""
    process = begin(folder, *overrides, **variables)
    told = process.communicate(timeout=60)[1]
    return process.returncode, told.splitlines()


def requeues(folder: Path) -> int:
    file = folder / "requeued"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def arguments(folder: Path) -> list[str]:
    return (folder / "srun.arguments").read_text().splitlines()


def test_the_command_and_its_variables(folder: Path) -> None:
    variables = {"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "1", "SLURM_CPUS_PER_GPU": "2"}
    code, lines = job(
        folder, "trainer.devices=-1", "epochs=3", FCMAE_PYTHON="apptainer exec 'a b.sif' python", **variables
    )
    assert code == 0, lines
    assert arguments(folder) == [
        *("--kill-on-bad-exit=1", "--export=ALL", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"),
        *("--cpus-per-task=2", "apptainer", "exec", "a b.sif", "python", "-m", "fcmae.pretrain", "+model=tiny"),
        *("run_dir=run", "epochs=3", "trainer.num_nodes=2", "trainer.devices=8"),
    ]
    told = (folder / "srun.environment").read_text().splitlines()
    assert "MASTER_ADDR=n1" in told
    assert "MASTER_PORT=10042" in told
    assert not [line for line in told if line.startswith(("SLURM_GPUS_PER_TASK", "SLURM_CPUS_PER_GPU"))]
    assert not list(folder.glob("run.job*"))


def test_it_imports_no_torch() -> None:
    code = (
        "import sys, fcmae.job, fcmae.command_line.launch as _; sys.exit(bool({'torch', 'lightning'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, 1),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_NTASKS": "6"}, 3),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"}, 4),
    ],
)
def test_processes_per_node(variables: dict[str, str], devices: int) -> None:
    trainer = {"accelerator": "auto", "num_nodes": 1, "devices": 1}
    geometry = Allocation.of({**ALLOCATED, **variables}).geometry(trainer, typed=[])
    on_cpu = {} if any("GPU" in name for name in variables) else {"trainer.accelerator": "cpu"}
    assert geometry == {"trainer.num_nodes": 2, "trainer.devices": devices, **on_cpu}


def test_tasks_count_on_cpus_of_a_job_with_gpus() -> None:
    allocation = Allocation.of({**ALLOCATED, "SLURM_GPUS_ON_NODE": "8"})
    trainer = {"accelerator": "cpu", "num_nodes": 1, "devices": 1}
    assert allocation.geometry(trainer, typed=[])["trainer.devices"] == 1


@pytest.mark.parametrize(
    ("overrides", "variables", "told"),
    [
        (
            ["trainer.devices=4"],
            {"SLURM_GPUS_ON_NODE": "8"},
            "trainer.devices=4 contradicts the job's --nodes=2 "
            "--gpus-per-node=8: leave it out, or sbatch --gpus-per-node=4 ...",
        ),
        (
            ["trainer.num_nodes=3"],
            {},
            "trainer.num_nodes=3 contradicts the job's --nodes=2 --ntasks-per-node=1: "
            "leave it out, or sbatch --nodes=3 ...",
        ),
        (
            [],
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "16,4"},
            "4 CPUs per node are too few for 8 processes: sbatch --cpus-per-gpu=8 ...",
        ),
        ([], {"SLURM_NTASKS": "5"}, "--ntasks=5 is no multiple of 2 nodes: use --ntasks-per-node instead"),
        (["epocs=3"], {}, "epocs is not an option; did you mean epochs?"),
        (["-m"], {}, "'-m' is not key=value; options of sbatch stand before the script"),
        (
            ["run_name=${now:%H}"],
            {},
            "run_name=${now:%H} is another folder after each requeue: use ${oc.env:SLURM_JOB_ID} instead of the time",
        ),
        ([], {"FCMAE_MAX_CRASHES": "many"}, "FCMAE_MAX_CRASHES=many must be a whole number from 1"),
        ([], {"NAMELESS": "scontrol: error: no slurm.conf"}, NAMELESS.format("scontrol: error: no slurm.conf")),
        ([], {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "REFUSAL": "no images", "CODE": "137"}, None),
    ],
)
def test_mistakes_are_one_line_and_no_requeue(
    folder: Path, overrides: list[str], variables: dict[str, str], told: str | None
) -> None:
    code, lines = job(folder, *overrides, **variables)
    assert code == 2, lines
    if told is None:  # found by a rank, while srun killed another
        assert lines[-1].endswith("run: refused, so it is not requeued: no images")
    else:
        assert lines == [f"fcmae: {told}"]
    assert not requeues(folder)
    assert not list(folder.glob("run.job*"))


def test_a_job_without_slurms_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    told = NAMELESS.format("scontrol cannot be run: No such file or directory")
    with pytest.raises(UserError, match=re.escape(told)):
        Allocation.of(ALLOCATED).environment(ALLOCATED)


def test_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="this is no SLURM job: sbatch -N 2 scripts/pretrain"):
        Allocation.of({})


def test_crashes_are_bounded_unless_something_is_saved(folder: Path) -> None:
    def start(number: int, step: int) -> tuple[int, list[str]]:
        journal = f'{STARTED}\n{{"event": "saved", "step": {step}}}'
        failed = '{"event": "failed", "step": 9, "rank": 1, "host": "n2", "error": "out of memory"}'
        again = {"SLURM_RESTART_COUNT": str(number), "RESTARTS": str(number)} if number else {}
        return job(folder, CODE="9", JOURNAL=f"{journal}\n{failed}", FCMAE_MAX_CRASHES="2", **again)

    for number, step in enumerate((10, 20, 30)):
        code, lines = start(number, step)
        assert code == 75
        assert requeues(folder) == number + 1
        assert f"crashed, exit code 9 (rank 1 on n2 at step 9: out of memory); saved is step {step}; req" in lines[-1]
    code, lines = start(3, 30)
    assert code == 9
    assert requeues(folder) == 3
    assert lines[-1].endswith(
        "given up after 2 crashes with nothing newer saved; starts: 4, preemptions: 0, crashes: 4"
    )
    assert not list(folder.glob("run.job*"))


def test_a_stop_is_no_crash_even_if_srun_says_so(folder: Path) -> None:
    stopped = '{"event": "stopped", "step": 7, "signal": "SIGUSR1"}'
    code, lines = job(folder, CODE="143", JOURNAL=f"{STARTED}\n{stopped}", FCMAE_MAX_CRASHES="1")
    assert (code, requeues(folder)) == (75, 1)
    assert "stopped by SIGUSR1" in lines[-1]
    code, lines = job(folder, CODE="143", SLURM_RESTART_COUNT="1", RESTARTS="1", FCMAE_MAX_CRASHES="1")
    assert (code, requeues(folder)) == (143, 1), "the stop before is not this start's"
    assert "crashes: 1" in lines[-1]


def test_a_run_that_ends_itself_before_its_last_step_is_not_done(folder: Path) -> None:
    """As trainer.max_time makes it: its exit code is 0, and the same command would end at once."""
    stopped = '{"event": "stopped", "step": 7, "signal": "an option of the trainer"}'
    code, lines = job(folder, JOURNAL=f"{STARTED}\n{stopped}")
    assert (code, requeues(folder)) == (0, 0)
    assert "run: not done: an option of the trainer ended the run at step 7, which is saved" in lines[-1]
    code, lines = job(folder, JOURNAL=f'{STARTED}\n{{"event": "finished", "step": 9}}')
    assert (code, requeues(folder)) == (0, 0)
    assert lines[-1].endswith("run: done; starts: 1, preemptions: 0, crashes: 0"), "the stop is an earlier start's"


def test_stops_with_nothing_saved_are_bounded_too(folder: Path) -> None:
    assert job(folder, CODE="75", FCMAE_MAX_PREEMPTIONS="2")[0] == 75
    code, lines = job(folder, CODE="75", FCMAE_MAX_PREEMPTIONS="2", SLURM_RESTART_COUNT="1", RESTARTS="1")
    assert (code, requeues(folder)) == (75, 1)
    assert "given up after 2 stops with nothing newer saved" in lines[-1]


def test_a_start_that_ended_without_a_word_counts_as_a_preemption(folder: Path) -> None:
    (folder / "run.job42.json").write_text(json.dumps({"starts": 1, "running": True}))
    code, lines = job(folder, SLURM_RESTART_COUNT="1", RESTARTS="1")
    assert code == 0
    assert lines[-1].endswith("done; starts: 2, preemptions: 1, crashes: 0")


@pytest.mark.parametrize(
    ("variables", "code", "requeued", "told"),
    [
        ({"STATE": "COMPLETING"}, 75, 0, "SLURM ends the job, so it is not requeued"),
        ({"STATE": "COMPLETING", "RESTARTS": "1"}, 75, 0, "SLURM itself requeues the job"),
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, 75, 1, "stopped by the time limit"),
        ({"DENIED": "Requested operation is presently disabled"}, 75, 1, "SLURM does not requeue it (Requested"),
    ],
)
def test_what_slurm_says_decides(folder: Path, variables: dict[str, str], code: int, requeued: int, told: str) -> None:
    ended, lines = job(folder, CODE="137", **variables)
    assert (ended, requeues(folder)) == (code, requeued)
    assert told in lines[-1]


@pytest.mark.parametrize(
    ("signum", "code", "requeued"), [(signal.SIGUSR1, 75, 1), (signal.SIGTERM, 75, 1), (signal.SIGINT, 130, 0)]
)
def test_signals_reach_srun_as_usr1(folder: Path, signum: int, code: int, requeued: int) -> None:
    process = begin(folder, WAIT="1", CODE="75")
    while not (folder / "run").is_dir():  # made just before srun's trap; its own answer is to end
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signum)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert (folder / "srun.signals").read_text() == "USR1\n"
    assert (process.returncode, requeues(folder)) == (code, requeued), lines


def test_resume_never_starts_over_once(folder: Path) -> None:
    (folder / "run").mkdir()
    other = STARTED.replace("42", "41")
    (folder / "run" / "journal.jsonl").write_text(f"{other}\n")
    job(folder, "resume=never", CODE="9")
    assert "resume=never" in arguments(folder)
    again = {"SLURM_RESTART_COUNT": "1", "RESTARTS": "1"}
    job(folder, "resume=never", CODE="9", JOURNAL=STARTED, **again)
    assert "resume=never" in arguments(folder), "the first start had not begun"
    job(folder, "resume=never", CODE="9", **again)
    assert "resume=never" not in arguments(folder)


def test_a_broken_tally_is_begun_afresh(tmp_path: Path) -> None:
    file = tmp_path / "tally.json"
    for content in ("{", "[]", '{"nonsense": 1}'):
        file.write_text(content)
        assert Tally.read(file) == Tally()
    tally = Tally(starts=3, crashes=2, step=7)
    tally.write(file)
    assert Tally.read(file) == tally


def test_the_scripts_differ_in_the_verb_alone() -> None:
    pretrain, finetune = (
        [line for line in (SCRIPTS / f"{verb}.slurm").read_text().splitlines() if not line.startswith("# sbatch")]
        for verb in ("pretrain", "finetune")
    )
    assert [line.replace("pretrain", "finetune") for line in pretrain] == finetune
