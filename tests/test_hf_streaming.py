"""Parquet files on the hub: read where they lie, each row group fetched once for all processes, and ahead of them."""

import errno
import hashlib
import json
import logging
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf import _cache, constants, dataset, datasets, epoch, hf, names, pictures, png, stored, write_parquet

from fcmae import UserError
from fcmae.data import parquet_shards
from fcmae.data.decoding import open_picture
from fcmae.data.hf import HFDataModule
from fcmae.data.hf_columns import Columns
from fcmae.data.parquet_shards import ParquetImages
from fcmae.data.picture import to_tensor
from fcmae.data.remote import RemoteCache

__all__ = ["_cache", "stored"]  # fixtures


class Hub(ThreadingHTTPServer):
    """As much of the hub as it takes to read `me/pictures`, on this machine alone."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.root = root
        self.failures = 0  # requests for a part of a file to refuse
        self.parts: list[tuple[str, str]] = []  # (path, range) of those answered
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = f"{self.url}/datasets/me/pictures/resolve/main"


class _Hub(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        of_api, of_files = path.partition("/api/datasets/me/pictures")[2], path.partition("/me/pictures/resolve/")[2]
        if path.endswith("/api/datasets/me/pictures") or of_api.startswith("/revision/"):
            self.answer(200, json.dumps({"id": "me/pictures", "sha": "0" * 40, "tags": [], "siblings": []}).encode())
        elif of_api.startswith("/tree/") and (folder := self.folder(of_api)).is_dir():
            self.answer(200, json.dumps([self.entry(file) for file in sorted(folder.iterdir())]).encode())
        elif of_api:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        elif of_files and (self.server.root / of_files.partition("/")[2]).is_file():
            self.file((self.server.root / of_files.partition("/")[2]).read_bytes())
        else:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound" if of_files else "RepoNotFound")

    def file(self, content: bytes) -> None:
        known = {"X_Repo_Commit": "0" * 40, "ETag": hashlib.sha256(content).hexdigest(), "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            self.answer(200, content, **known)
        elif self.server.failures:
            self.server.failures -= 1
            self.answer(503)
        else:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            self.server.parts.append((self.path, self.headers["Range"]))
            self.answer(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}", **known)

    def folder(self, of_api: str) -> Path:
        return self.server.root / of_api.removeprefix("/tree/").partition("/")[2]

    def entry(self, file: Path) -> dict[str, Any]:
        kind = "directory" if file.is_dir() else "file"
        path = file.relative_to(self.server.root).as_posix()
        return {"type": kind, "oid": "0", "size": file.stat().st_size, "path": path}

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content_Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(stored: Path) -> Iterator[Hub]:
    server = Hub(stored / "parquets")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("fcmae.data.patience.time.sleep", waited.append)
    return waited


def doubled(waits: list[float]) -> bool:
    """From a second on, each twice as long, give or take a half."""
    return all(0.5 <= wait / 2**number <= 1.5 for number, wait in enumerate(waits))


def opened(hub: Hub, folder: Path, *, gib: float = 1) -> ParquetImages:
    """Eight pictures in row groups of three."""
    url = f"{hub.files}/data/train-00000-of-00003.parquet"
    columns, cache = Columns("image", None), RemoteCache(folder=folder / "cache", gib=gib)
    return ParquetImages(files={"train": [url]}, features={}, columns=columns, kept=1, cache=cache, in_chans=3)


def test_a_server_that_fails_for_a_while_is_asked_again(hub, stored, tmp_path, waits):
    source = opened(hub, tmp_path)
    hub.failures = 3
    file = pictures(stored, "train")[0]
    assert torch.equal(
        to_tensor(source.open(0).decode()), to_tensor(open_picture(file, name=file.name, in_chans=3).decode())
    )
    assert len(waits) == 3
    assert doubled(waits)
    read = len(hub.parts)
    source.open(1)
    assert len(hub.parts) == read  # of the same row group


def test_a_server_that_fails_for_a_minute_ends_the_run(hub, tmp_path, waits):
    source = opened(hub, tmp_path)
    hub.failures = 1000
    with pytest.raises(
        UserError, match=r"row group 1 of http://.*train-00000-of-00003.parquet could not be fetched"
    ) as told:
        source.open(3)
    assert len(str(told.value).splitlines()) == 1
    assert len(waits) == 6
    assert doubled(waits)


def as_the_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does in a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)


def on_the_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> HFDataModule:
    as_the_hub(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", folder / "hub")
    options = {"num_workers": 2, "cache_dir": str(folder / "cache"), **options}
    return hf("me/pictures", streaming=True, val_split="validation", **options)


@pytest.mark.parametrize("options", [{}, {"revision": "refs/convert/parquet", "name": "data"}], ids=["main", "parquet"])
def test_a_name_on_the_hub_is_read_where_it_lies(hub, stored, tmp_path, monkeypatch, options):
    local = hf(stored / "parquets", streaming=True, val_split="validation")
    there = on_the_hub(hub, tmp_path, monkeypatch, **options)
    assert there.fingerprint() == local.fingerprint()
    mine, its = epoch(local, 0), epoch(there, 0)
    assert names(mine) == names(its)
    assert all(torch.equal(a.images, b.images) for a, b in zip(mine, its, strict=True))
    assert len(hf("me/pictures", val_split="validation").source) == 30  # fetched
    with pytest.raises(UserError, match="me/nothing is neither a folder nor a data set that the hub lets"):
        hf("me/nothing").source  # noqa: B018


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path, monkeypatch, offline):
    as_the_hub("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data.path=me/pictures is no folder, and http://127.0.0.1:9 cannot") as told:
        hf("me/pictures").source  # noqa: B018
    assert time.monotonic() - start < 10
    assert "`hf download --repo-type dataset me/pictures --local-dir DIR`" in str(told.value)
    assert len(str(told.value).splitlines()) == 1


# -- what is fetched --


def test_processes_share_what_is_fetched_once(hub, tmp_path, monkeypatch):
    """Two ranks with two workers each, and two epochs: nine row groups to learn from."""
    ranks = [on_the_hub(hub, tmp_path, monkeypatch, mixed_shards=2) for _ in range(2)]
    sources = [rank.source for rank in ranks]
    hub.parts.clear()
    for number in range(2):
        read = [name for rank, data in enumerate(ranks) for name in names(epoch(data, number, rank, 2))]
        assert len(set(read)) == len(read) == 24
    fetched = [name for source in sources[:1] for name in source.shard_names if name.startswith("train")]
    assert len(hub.parts) == len(set(hub.parts)) == len(fetched)
    assert len(list((tmp_path / "cache").glob("shard-*"))) == len(fetched)


def test_the_next_row_groups_are_fetched_while_the_present_ones_are_read(hub, tmp_path, monkeypatch):
    data = on_the_hub(hub, tmp_path, monkeypatch, mixed_shards=1, num_workers=0, batch_size=1)
    data.source  # noqa: B018
    hub.parts.clear()
    batches = iter(train_batches(data))
    next(batches)
    end = time.monotonic() + 30
    while len(hub.parts) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(hub.parts) == 2  # the present one, and the next, of which no sample was asked for
    assert len(list(batches)) == 23


def test_a_cache_that_holds_a_single_row_group_serves_as_well(hub, stored, tmp_path):
    kept, whole = opened(hub, tmp_path, gib=1e-9), opened(hub, tmp_path / "other")
    for index in (0, 3, 7, 1, 6):
        assert torch.equal(to_tensor(kept.open(index).decode()), to_tensor(whole.open(index).decode()))
        assert len(list((tmp_path / "cache").glob("shard-*"))) == 1


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b""], ids=["half", "empty"])
def test_a_file_of_the_cache_that_is_not_whole_is_fetched_once_more(hub, tmp_path, caplog, damage):
    expected = to_tensor(opened(hub, tmp_path).open(0).decode())
    (file,) = (tmp_path / "cache").glob("shard-*")
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(to_tensor(opened(hub, tmp_path).open(0).decode()), expected)
    assert "row group 0 of http" in caplog.text
    assert "it is fetched once more" in caplog.text


def test_a_full_disk_is_said_in_a_line_and_leaves_nothing(hub, tmp_path, monkeypatch):
    def full(path: Path, name: str, column: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet_shards, "_write_arrow", full)
    with pytest.raises(UserError, match=r"data.cache_dir=.* cannot be used \(No space left on device\): free space"):
        opened(hub, tmp_path).open(0)
    assert not [file for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")]


def test_another_version_of_a_file_is_another_one(hub, stored, tmp_path):
    first = opened(hub, tmp_path)
    first.open(0)
    hub.root = stored / "other"
    file = hub.root / "data" / "train-00000-of-00003.parquet"
    write_parquet(dataset({"image": [png(7)] * 3, "label": [0] * 3}), file, 3)
    assert to_tensor(opened(hub, tmp_path).open(0).decode()).unique().tolist() == [7]


def train_batches(data: HFDataModule) -> Any:
    """Without an epoch's end: `epoch` reads all."""
    data.trainer = None
    return data.train_dataloader()
