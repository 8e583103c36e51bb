"""What may pass by itself is told from what a user must mend: a job tries only the former again."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from micro import pretrain

from fcmae.checkpoints.format import newest_checkpoint
from fcmae.checkpoints.sharded import REST
from fcmae.data.dataset import ImageDataset
from fcmae.data.patience import insist
from fcmae.data.remote import RemoteCache
from fcmae.data.shard_list import open_shard
from fcmae.data.webdataset import Shard
from fcmae.errors import TransientError, UserError
from fcmae.files import write_text


class Unreadable:
    """Three pictures, none of which can be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def sample_id(self, index: int) -> str:
        return f"{index}.jpg"

    def open(self, index: int) -> Any:
        raise self.error


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True),  # nothing is mounted there
        (OSError("image file is truncated"), False),  # Pillow's own
        (ValueError("no picture"), False),
    ],
)
def test_images_that_cannot_be_read_all_at_once(error: Exception, passes: bool) -> None:
    images = ImageDataset(source=Unreadable(error), indices=range(3), transform=torch.clone, seed=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="3 images in a row cannot be read") as told:
        images[0, 0]
    assert isinstance(told.value, TransientError) == passes


@pytest.mark.parametrize(
    ("error", "passes"), [(ConnectionError("reset"), True), (TimeoutError("late"), True), (PermissionError(), False)]
)
def test_a_server_that_does_not_answer(error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcmae.data.patience.time", SimpleNamespace(sleep=float))
    with pytest.raises(UserError) as told:
        insist("x.tar", failing(error), tries=2)
    assert isinstance(told.value, TransientError) == passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [(OSError(errno.EIO, "Input/output error"), True), (PermissionError(errno.EACCES, "Permission denied"), False)],
)
def test_a_shard_that_was_there(
    error: Exception, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "open", failing(error))
    with pytest.raises(UserError, match=r"shard x\.tar cannot be opened: \w+.*; mend that") as told:
        open_shard(Shard("x.tar", 1, 1), RemoteCache(folder=tmp_path, gib=1))
    assert isinstance(told.value, TransientError) == passes


@pytest.mark.parametrize(("status", "passes"), [(503, True), (404, False), (401, False)])
def test_a_hub_that_answers_with_an_error(status: int, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub
    from huggingface_hub.utils import HfHubHTTPError

    from fcmae.data.hf import _check_hub

    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = HfHubHTTPError(f"Error {status}", response=response)  # type: ignore[arg-type]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "dataset_info", failing(error))
    with pytest.raises(UserError, match=str(status)) as told:
        _check_hub("me/pictures", None)
    assert isinstance(told.value, TransientError) == passes


def test_what_a_refusal_is_told_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, which is what the refusal may be about."""
    monkeypatch.setenv("FCMAE_REFUSED", str(tmp_path / "nowhere" / "refused"))
    assert pretrain(tmp_path, "epochz=3").error.startswith("epochz is not an option")


def test_the_first_refusal_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks tell it too, from hearsay."""
    monkeypatch.setenv("FCMAE_REFUSED", str(tmp_path / "refused"))
    for option in ("epochz=3", "sead=3"):
        assert pretrain(tmp_path, option).code == 2
    assert (tmp_path / "refused").read_text().startswith("epochz is not an option")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("asked", ["iterdir", "stat", "torch.load"])
def test_a_checkpoint_that_its_file_system_keeps_to_itself(
    code: int, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither damaged nor gone: nobody begins again, or goes on from an older one, because of it."""
    file = tmp_path / "checkpoints" / "epoch=0001-step=00000001.ckpt"
    file.parent.mkdir()
    torch.save({"state_dict": {}, "fcmae": {"format": 1, "model": {}}}, file)
    assert newest_checkpoint(tmp_path) == file
    error = OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        if asked == "torch.load":
            patch.setattr("fcmae.checkpoints.format.torch.load", failing(error))
        else:
            patch.setattr(Path, asked, failing(error))
        with pytest.raises(TransientError, match=rf"cannot read {file.parent}.*: {os.strerror(code)}; see whether"):
            newest_checkpoint(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="holds no checkpoint that can be read") as told:
        newest_checkpoint(tmp_path)
    assert not isinstance(told.value, TransientError)
    file.unlink()
    assert newest_checkpoint(tmp_path) is None


def test_a_sharded_checkpoint_whose_files_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "epoch=0001-step=00000001.ckpt"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {}, "fcmae": {"format": 1, "model": {}}, "sharded_files": {"rank-0": 9}}, folder / REST)
    stat = Path.stat

    def stale(self: Path, **options: Any) -> os.stat_result:
        if self.name == "rank-0":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(TransientError, match=f"cannot read {folder}: Stale file handle"):
        newest_checkpoint(tmp_path)


def test_a_file_system_that_fails_at_clearing_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "unlink", stale)
    monkeypatch.setattr(Path, "replace", stale)
    with pytest.raises(TransientError, match=r"cannot write .*: Stale file handle; see whether its disk or server"):
        write_text(tmp_path / "a", "text")
