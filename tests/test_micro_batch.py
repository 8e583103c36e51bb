"""data.batch_size=auto: the largest part of a step that fits."""

from pathlib import Path

import pytest
import torch
from micro import MICRO, pretrain

from fcmae.errors import UserError
from fcmae.training.micro_batch import candidates, first_that_fits
from fcmae.training.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("share", "multiple_of", "sizes"),
    [
        (16, 2, [16, 8, 4, 2]),
        (24, 2, [24, 12, 8, 6, 4, 2]),
        (24, 8, [24, 8]),
        (6, 6, [6]),
        (1024, 256, [1024, 512, 256]),
    ],
)
def test_candidates_divide_the_share(share: int, multiple_of: int, sizes: list[int]) -> None:
    assert candidates(share, multiple_of=multiple_of) == sizes


def test_a_share_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="leaves each device 7 images, no multiple of 2"):
        candidates(7, multiple_of=2)


def test_the_largest_that_fits_is_taken_and_memory_is_given_back() -> None:
    tried, forgotten = [], []

    def fits(size: int) -> bool:
        tried.append(size)
        if size > 48:
            raise torch.OutOfMemoryError(f"{size} images")
        return size <= 32  # 48 leave no room

    assert first_that_fits([96, 48, 32, 24], fits, lambda: forgotten.append(tried[-1])) == 32
    assert tried == [96, 48, 32]
    assert forgotten == [96, 48]
    assert first_that_fits([96, 48], fits, lambda: None) is None


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def broken(size: int) -> bool:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        first_that_fits([2], broken, lambda: None)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_a_lack_of_memory_has_several_names(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_it_needs_a_cuda_device_and_an_effective_batch(tmp_path: Path) -> None:
    with_effective = pretrain(tmp_path, *MICRO, "data.batch_size=auto", "effective_batch=16")
    assert with_effective.error == (
        "data.batch_size=auto tries what a CUDA device's memory takes: give a number, such as 64, here"
    )
    without = pretrain(tmp_path, *MICRO, "data.batch_size=auto")
    assert without.error.startswith("data.batch_size=auto keeps effective_batch: say how many")
    assert not (tmp_path / "outputs").exists()


def test_the_session_takes_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def found(module, data, device, *, precision: str, share: int) -> int:
        asked.append((precision, share))
        batch = module.example(torch.randn(2, 3, 64, 64))
        assert module.loss(batch).isfinite()  # what would be tried works
        return 4

    monkeypatch.setattr("fcmae.training.session.largest_micro_batch", found)
    done = pretrain(tmp_path, *MICRO, "data.batch_size=auto", "effective_batch=16")
    assert done.code == 0, done
    assert asked == [("32-true", 16)]
    assert "batch: 16 images per step = 4 per device x 1 devices x 1 nodes x 4 accumulated" in done.err
