"""What several ranks cost on this machine, over gloo on its CPU: the figures of docs/scaling.md.

python scripts/measure_ranks.py exchange    # one agreement before a batch; the gradients of atto and tiny
python scripts/measure_ranks.py training    # images per second of 1, 2, 4 ranks, and of as many runs side by side
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fcmae import create_model
from fcmae.stopping import StopRequest
from fcmae.training.agreement import Agreement

RUN = [
    *("+model=atto", "data=digits", "data.batch_size=32", "data.val_images=32", "pictures=0"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.limit_train_batches=10", "trainer.log_every_n_steps=10"),
    *("epochs=3", "optim.warmup_epochs=0"),
]
COUNTS = (1, 2, 4)
ROUNDS = 3


def exchange(counts: Sequence[int] = (2, 4, 8)) -> str:
    """Milliseconds of each kind of exchange by the number of ranks: medians, and the quartiles."""
    columns, rows = ["ranks"], []
    for ranks in counts:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_measure_exchange, args=(ranks, folder), nprocs=ranks)
            found = json.loads((Path(folder) / "seconds.json").read_text())
        columns = ["ranks", *(f"{name}: ms" for name in found)]
        rows.append([str(ranks), *(_cell([1e3 * value for value in values]) for values in found.values())])
    return table(columns, rows)


def _measure_exchange(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    agreement = Agreement(StopRequest())
    agreement.open(timedelta(seconds=60))
    found = {"agreement": _seconds(agreement.agree, 300)}
    for size in ("atto", "tiny"):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in create_model(size).parameters())
        gradients = torch.ones(count)
        found[f"gradients of {size}, {4e-6 * count:.0f} MB"] = _seconds(partial(dist.all_reduce, gradients), 10)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _seconds(step: Callable[[], object], repeats: int) -> list[float]:
    for _ in range(3):
        step()
    found = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def training() -> str:
    """Images per second of all ranks together, and of as many runs of one rank at the same time; they take turns."""
    found: Mapping[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for ranks in COUNTS:
            found[ranks, "one run"].append(_images_per_second(runs=1, ranks=ranks))
            if ranks > 1:
                found[ranks, "apart"].append(_images_per_second(runs=ranks, ranks=1))
        print(dict(found), file=sys.stderr)
    rows = []
    for (ranks, kind), values in found.items():
        each = ", ".join(f"{value:.0f}" for value in values)
        rows.append([str(ranks), kind, f"{statistics.median(values):.0f}", each])
    return table(["ranks", "as", "images/s, median", "each round"], rows)


def _images_per_second(*, runs: int, ranks: int) -> float:
    """The sum over runs that go on at the same time, of the steps after the first ten."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(runs)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "fcmae.pretrain", *RUN, f"trainer.devices={ranks}", f"run_dir={run}"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=run.with_suffix(".log").open("w"),
            )
            for run in folders
        ]
        failed = [run for run, process in zip(folders, processes, strict=True) if process.wait()]
        if failed:
            raise RuntimeError(failed[0].with_suffix(".log").read_text())
        return sum(_after_the_first_line(run / "metrics.jsonl") for run in folders)


def _after_the_first_line(metrics: Path) -> float:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.fmean([line["images_per_sec"] for line in lines if "images_per_sec" in line][1:])


def _cell(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    print({"exchange": exchange, "training": training}[sys.argv[1]]())
