"""Checkpoints in a folder: their rows, whatever number of ranks wrote them; and what is said of a damaged one."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fcmae.checkpoints.format import newest_checkpoint, read_checkpoint
from fcmae.checkpoints.sharded import REST, assemble, finish, read_sharded, remove, write_rank
from fcmae.errors import UserError


def write(path: Path, tensor: Tensor, ranks: int) -> Path:
    """What so many ranks write; torch.chunk deals out the rows, and the last ranks may get none."""
    pieces = [*tensor.chunk(ranks), *[tensor[:0]] * ranks][:ranks]
    temporary = path.with_name(f".{path.name}.tmp")
    sizes = dict(
        write_rank(temporary, rank, {"/state_dict/a": piece.contiguous()}) for rank, piece in enumerate(pieces)
    )
    rest = {"fcmae": {"format": 1, "model": {}}, "state_dict": {"a": tensor.to("meta"), "b": (1, 2)}, "list": [3]}
    finish(temporary, path, rest, sizes)
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoints of a run's second and fourth step."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first, second = (
        write(folder / f"epoch=0001-step=0000000{step}.ckpt", torch.full((50, 9), step / 2), ranks=2) for step in (2, 4)
    )
    assert newest_checkpoint(tmp_path) == second
    return first, second


@pytest.mark.parametrize(("length", "ranks"), [(7, 3), (1, 4), (4, 4), (9, 4)])
def test_any_rows_are_read_from_the_files_they_are_in(tmp_path: Path, length: int, ranks: int) -> None:
    tensor = torch.arange(length * 2.0).view(length, 2)
    read = read_sharded(write(tmp_path / "x.ckpt", tensor, ranks))
    assert (read["list"], read["state_dict"]["b"]) == ([3], (1, 2))
    assert torch.equal(assemble(read)["state_dict"]["a"], tensor)
    rows = read["state_dict"]["a"]
    for start in range(length + 1):
        for stop in range(start, length + 1):
            assert torch.equal(rows[start:stop], tensor[start:stop])


@pytest.mark.parametrize("damage", ["missing", "truncated", "rest missing", "rest truncated"])
def test_an_incomplete_checkpoint_is_named_and_passed_over(two: tuple[Path, Path], damage: str) -> None:
    first, second = two
    file = second / (REST if "rest" in damage else "rank-00001.safetensors")
    size = file.stat().st_size
    if "missing" in damage:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as error:
        read_checkpoint(second)
    said = {
        "missing": f"{file} is missing: copy it back, or take the checkpoint before",
        "truncated": f"{file} has {size - 100:,} bytes of {size:,}: copy it back, or take the checkpoint before",
        "rest missing": f"{second} does not exist",
        "rest truncated": f"{second} cannot be read, it is truncated or no checkpoint",
    }
    assert str(error.value).startswith(said[damage])
    assert newest_checkpoint(second.parent.parent) == first


def test_until_all_ranks_have_written_the_checkpoint_before_is_the_newest(two: tuple[Path, Path]) -> None:
    first, second = two
    remove(second)
    assert newest_checkpoint(second.parent.parent) == first
    temporary = second.with_name(f".{second.name}.tmp")
    sizes = dict([write_rank(temporary, 0, {"/a": torch.zeros(1)})])
    assert newest_checkpoint(second.parent.parent) == first
    with pytest.raises(UserError, match=r"rank-00001.* is not there: run_dir must be on a file system that all nodes"):
        finish(temporary, second, {}, sizes | {"rank-00001.safetensors": 9})
    assert newest_checkpoint(second.parent.parent) == first


@pytest.mark.parametrize("space", [0, 1000, 50_000, 120_500])
def test_a_failed_write_is_told_and_leaves_the_checkpoint_before(two: tuple[Path, Path], space: int) -> None:
    """At the beginning of the rest, among its tensors (where torch hides the reason), at its end."""
    temporary = two[1].with_name(".x.tmp")
    sizes = dict([write_rank(temporary, 0, {"/a": torch.zeros(1)})])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))  # as a full disk, but root is not needed
    try:
        with pytest.raises(UserError, match=rf"^cannot write {temporary / REST}: File too large; free space or mend"):
            finish(temporary, two[1], {"a": torch.zeros(30_000)}, sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_checkpoint(two[1].parent.parent) == two[1]
    assert [path.name for path in temporary.iterdir()] == [*sizes]


def test_a_checkpoint_is_written_over_another(two: tuple[Path, Path]) -> None:
    write(two[1], torch.zeros(3, 1), ranks=1)
    assert sorted(path.name for path in two[1].iterdir()) == ["rank-00000.safetensors", REST]
    assert read_sharded(two[1])["state_dict"]["a"].shape == (3, 1)


def test_nothing_in_a_checkpoint_is_run(two: tuple[Path, Path], tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"fcmae": Harmful()}, two[1] / REST)
    with pytest.raises(UserError, match="is no checkpoint of plain data; what else it holds is not loaded"):
        read_checkpoint(two[1])
    assert not (tmp_path / "harm").exists()
