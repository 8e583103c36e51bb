"""What happens when a device's memory does not suffice."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from fcmae.errors import UserError

T = TypeVar("T")


def within_memory(run: Callable[[int], T], batch_size: int, *, halve: bool, say: Callable[[str], object]) -> T:
    """`run(batch_size)`; where memory does not suffice, with half the batch if `halve` allows it, and so on.

    Args:
        run: what to do with so many images; is to keep nothing when it fails.
        batch_size: to begin with.
        halve: try again with less.
        say: told each time what was too large.

    Raises:
        UserError: the memory does not suffice, and less was not allowed or is impossible.
    """
    while True:
        try:
            return run(batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not halve or batch_size == 1:
                hint = "a smaller batch_size, halve=true, fewer baselines" if batch_size > 1 else "fewer baselines"
                raise UserError(
                    f"out of memory with batch_size={batch_size}: use {hint} or model.grad_checkpointing=block"
                ) from error
        # Outside of `except`: the error holds on to every frame, and so to the memory.
        say(f"out of memory with batch_size={batch_size}: trying {batch_size // 2}")
        batch_size //= 2
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what an error means."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator, CUDA itself, and its libraries when they set up, which take memory besides torch's.
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(words in str(error) for words in (*said, "CUDNN_STATUS_ALLOC_FAILED"))
