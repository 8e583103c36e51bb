"""What all loaders share: worker processes that leave signals alone, and the normalisation on the device."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fcmae.data.dataset import ImageDataset
from fcmae.data.source import collate
from fcmae.data.watch import WatchedLoader


def open_loader(
    dataset: ImageDataset,
    order: Sampler[tuple[int, ...]] | Sequence[tuple[int, ...]],
    *,
    batch_size: int,
    num_workers: int | str,
    most_workers: int = 1000,
    local_ranks: int = 1,
    timeout: float = 0,
) -> WatchedLoader:
    """Batches of a data set.

    Args:
        dataset: of samples.
        order: the keys of the samples.
        batch_size: images per batch.
        num_workers: processes that read; `auto` is up to 8, within the cores of this process.
        most_workers: never more than these.
        local_ranks: processes of this machine that share its cores.
        timeout: seconds to wait for a batch of the workers before giving up; 0: for ever.
    """
    share = max(1, min(8, _cores_of_rank(local_ranks)))
    workers = min(most_workers, share if num_workers == "auto" else int(num_workers))
    return WatchedLoader(
        dataset,
        sampler=order,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_the_run,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


class Normalization:
    """Pixels to normalised float32, on whatever device they are.

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std
        self.eight_bits = True  # whether the latest images had 8 bits per channel
        self._rows: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (x - mean) / std, float32, in channels-last memory; x / 255 for uint8 images."""
        self.eight_bits = images.dtype == torch.uint8
        whole = 255 if self.eight_bits else 1
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        batch, _, height, width = images.shape
        if (images.device, width) not in self._rows:  # copied to the device once: every copy makes a GPU wait
            both = torch.tensor([[*self.mean], [*self.std]], dtype=torch.float32, device=images.device)
            self._rows[images.device, width] = both.repeat(1, width)  # (2, W*C)
        mean, std = self._rows[images.device, width]
        rows = images.permute(0, 2, 3, 1).view(batch, height, -1)  # (B, H, W*C): in place, and three times as fast
        rows.div_(whole).sub_(mean).div_(std)
        return images


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores_of_rank(local_ranks: int) -> int:
    """Cores for one of so many processes of this machine; srun may have bound it to cores of its own already."""
    started_by_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    own = int(os.environ.get("SLURM_CPUS_PER_TASK") or 0) if started_by_srun else 0
    cores = usable_cores()
    return cores if cores <= own else cores // local_ranks


def leave_signals_to_the_run(worker: int) -> None:
    """What a worker process begins with.

    Ctrl-C reaches every process of a terminal, and what a cluster sends every process of a job: the run itself ends
    its step, saves, and then ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # Windows has no SIGUSR1
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    run, told = multiprocessing.parent_process(), sys.excepthook
    # A signal may end the run's waiting in the midst of a batch, which the thread that hands it over need not tell.
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, EOFError | ConnectionError) else told(kind, *rest)
    if hasattr(signal, "sigtimedwait") and run is not None:  # neither Windows nor macOS has it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(run,), daemon=True).start()


def _end_for(run: BaseProcess) -> None:
    """Ends this process when the run says so, or is gone: the worker holds a copy of its connections open."""
    while run.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, 0.5)
        if told is not None and told.si_pid == run.pid:
            break
    os._exit(0)
