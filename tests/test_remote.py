"""Shards of other machines: servers that fail, lie and stall; a cache that is whole, bounded and shared."""

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import socketserver
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from test_webdataset import data_module, index_beside, pixels, write_shard, write_shards

from fcmae import UserError
from fcmae.data.patience import insist
from fcmae.data.remote import RemoteCache
from fcmae.data.webdataset import WebDataset
from fcmae.errors import TransientError


class Server:
    """A web server of a folder, which can be told to misbehave.

    Attributes:
        faults: by file name, what is to go wrong with the next GETs: 503, 403, cut (half of it, then nothing), short
            (half of it, as if that were all), empty (nothing, as if that were all), garbled (other bytes every time) or
            stall (half of it, then silence).
        gets: by file name, how often it was asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.tells_length = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(head=True)

            def do_GET(self) -> None:
                self._answer(head=False)

            def _answer(self, head: bool) -> None:
                name = self.path.rpartition("/")[2]
                path = folder / self.path.lstrip("/")
                fault = ""
                if not head:
                    server.gets[name] += 1
                    fault = server.faults[name].pop(0) if server.faults[name] else ""
                if fault.isdigit() or not path.is_file():
                    self.send_error(int(fault or 404))
                    return
                content = path.read_bytes()
                half = b"" if fault == "empty" else content[: len(content) // 2]
                self.send_response(200)
                if server.tells_length:
                    self.send_header("Content-Length", str(len(half if fault in ("short", "empty") else content)))
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                self.end_headers()
                if head:
                    return
                if fault == "garbled":
                    half = content[:-8] + os.urandom(8)
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(half if fault else content)
                    self.wfile.flush()
                    if fault == "stall":
                        time.sleep(20)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass

            def server_bind(self) -> None:  # without asking a name server who we are
                socketserver.TCPServer.server_bind(self)
                self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "www").mkdir()
    started = Server(tmp_path / "www")
    thread = threading.Thread(target=started.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield started
    started.http.shutdown()
    started.http.server_close()


def cache(tmp_path: Path, gib: float = 1, tries: int = 3) -> RemoteCache:
    return RemoteCache(folder=tmp_path / "cache", gib=gib, tries=tries, first_wait=0.01)


def source(path: str, kept: RemoteCache) -> WebDataset:
    return WebDataset(path=path, val_path=None, in_chans=3, cache=kept, most_open=4)


def pictures(images: WebDataset, indices: range) -> bool:
    return all(np.array_equal(np.asarray(images.open(index).decode()), pixels(index)) for index in indices)


def whole_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("shard-*"))


# -- HTTP --


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_come_from_a_server_that_sometimes_fails(indexed, server, tmp_path, caplog):
    write_shards(tmp_path / "www" / "in", 3)
    if indexed:
        index_beside(tmp_path / "www" / "in")
        server.faults["index.json"] = ["503"]
    server.faults |= {"x-000.tar": ["503", "cut"], "x-001.tar": ["cut"], "x-002.tar": ["short", "503"]}
    with caplog.at_level(logging.WARNING):
        images = source(f"{server.url}/in/x-{{000..002}}.tar", cache(tmp_path))
        assert pictures(images, range(18))
    assert images.labels.tolist() == [number % 3 for number in range(18)]
    assert images.sample_id(7) == "x-001.tar:1"
    tries = {name: server.gets[name] for name in server.faults if name.endswith("tar")}
    assert tries == {"x-000.tar": 3, "x-001.tar": 2, "x-002.tar": 3}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 5 + indexed
    assert any("x-000.tar: try 1 of 3 failed (ClientResponseError: 503" in line for line in warned)
    assert not list((tmp_path / "cache").glob(".*.part"))
    assert pictures(source(f"{server.url}/in/x-{{000..002}}.tar", cache(tmp_path)), range(18))
    assert tries == {name: server.gets[name] for name in tries}  # nothing was fetched again


def test_a_folder_of_a_server_is_known_by_its_index(server, tmp_path):
    write_shards(tmp_path / "www" / "in", 2)
    with pytest.raises(UserError, match=r"data.path=http.*/in holds no index.json, and folders of other machines are"):
        source(f"{server.url}/in", cache(tmp_path))
    index_beside(tmp_path / "www" / "in")
    images = source(f"{server.url}/in/", cache(tmp_path))
    assert images.shard_names == ["x-000.tar", "x-001.tar"]
    assert not whole_files(tmp_path)  # the index suffices
    assert pictures(images, range(12))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "ClientResponseError: 503"),
        ("cut", "ClientPayloadError: "),
        ("garbled", "ValueError: its sha256 is [0-9a-f]{64}, not "),
    ],
)
def test_after_some_tries_it_gives_up_in_one_line(fault, reason, server, tmp_path):
    (path,) = write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in", sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    server.faults["x-000.tar"] = [fault] * 9
    images = source(f"{server.url}/in", cache(tmp_path))
    with pytest.raises(
        UserError, match=rf"{server.url}/in/x-000.tar could not be fetched in 3 tries, at last {reason}"
    ) as e:
        images.open(0)
    assert isinstance(e.value, TransientError)
    assert "\n" not in str(e.value)
    assert server.gets["x-000.tar"] == 3
    assert not whole_files(tmp_path)


@pytest.mark.parametrize("fault", ["empty", "short"])
def test_a_server_that_is_unwell_for_a_moment_answers_alike(fault, server, tmp_path):
    """Whatever it sends three times, it knows the shard's true size all along."""
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in")
    server.faults["x-000.tar"] = [fault] * 3
    assert pictures(source(f"{server.url}/in", cache(tmp_path, tries=7)), range(6))
    assert server.gets["x-000.tar"] == 4


@pytest.mark.parametrize("status", ["403", "404"])
def test_what_is_not_there_is_not_asked_for_again(status, server, tmp_path):
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in")
    server.faults["x-000.tar"] = [status]
    with pytest.raises(
        UserError, match=r"in/x-000.tar cannot be read \(.*\): check the address, the file, permissions"
    ):
        source(f"{server.url}/in", cache(tmp_path)).open(0)
    assert server.gets["x-000.tar"] == 1
    with pytest.raises(UserError, match=r"in/y.tar cannot be read"):
        source(f"{server.url}/in/y.tar", cache(tmp_path))


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match=r"index.json could not be fetched in 2 tries, at last Client\w+Error: "):
        source("http://127.0.0.1:9/in/x.tar", cache(tmp_path, tries=2))
    with pytest.raises(
        UserError, match=r"xyz://host/index.json cannot be read \(Protocol not known: xyz.*\): use a path"
    ):
        source("xyz://host/x.tar", cache(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"sha256": "0" * 64}, r"its sha256 is [0-9a-f]{64}, not 0{64}"), ({"size": 77}, r"\d{4,} bytes came, not 77")],
)
def test_a_shard_that_is_not_what_its_index_says_is_fetched_twice(changes, reason, server, tmp_path):
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in", **changes)
    images = source(f"{server.url}/in", cache(tmp_path, tries=7))
    with pytest.raises(UserError, match=rf"in/x-000.tar is not what its index, or .* \(twice {reason}\): write") as e:
        images.open(0)
    assert not isinstance(e.value, TransientError)  # no other try helps
    assert "\n" not in str(e.value)
    assert server.gets["x-000.tar"] == 2
    assert not whole_files(tmp_path)
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_server_that_does_not_say_how_long_a_shard_is_may_cut_it_once(server, tmp_path, caplog):
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in", size=None)
    server.tells_length = False
    server.faults["x-000.tar"] = ["short"]
    with caplog.at_level(logging.WARNING):
        assert pictures(source(f"{server.url}/in", cache(tmp_path)), range(6))
    assert "x-000.tar ends at byte" in caplog.text
    assert server.gets["x-000.tar"] == 2
    assert pictures(source(f"{server.url}/in", cache(tmp_path)), range(6))
    assert server.gets["x-000.tar"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"x-000.tar ends at byte \d+, after "),
        ({"samples": 7, "labels": None}, "x-000.tar holds 6 samples, not 7 as its index says: "),
        ({"labels": [0, 1, 2, 0, 2, 2]}, "sample 4 of shard .*/x-000.tar is of class 1, not 2 as it was indexed "),
    ],
)
def test_what_is_refused_is_not_kept(changes, message, server, tmp_path):
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in", **{"size": None, **changes})
    server.tells_length = False
    server.faults["x-000.tar"] = [] if changes else ["short", "short"]
    with pytest.raises(UserError, match=message):
        source(f"{server.url}/in", cache(tmp_path)).open(0)
    assert server.gets["x-000.tar"] == 2
    assert not whole_files(tmp_path)
    index_beside(tmp_path / "www" / "in", size=None)
    assert pictures(source(f"{server.url}/in", cache(tmp_path)), range(6))


def test_what_was_kept_cut_short_is_fetched_again(server, tmp_path):
    (path,) = write_shards(tmp_path / "www", 1)
    images = source(f"{server.url}/{path.name}", cache(tmp_path))
    (kept,) = whole_files(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1024].rstrip(b"\0").ljust(len(whole), b"x"))  # of the same size
    assert pictures(images, range(6))
    assert whole_files(tmp_path) == [kept]
    assert kept.read_bytes() == whole


def test_a_shard_that_changed_on_its_server_is_fetched_again(server, tmp_path):
    path = write_shard(tmp_path / "www" / "x.tar", range(3))
    images = source(f"{server.url}/x.tar", cache(tmp_path))
    assert pictures(images, range(3))
    write_shard(path, range(5))
    again = source(f"{server.url}/x.tar", cache(tmp_path))
    assert len(again) == 5
    assert pictures(again, range(5))


def test_workers_fetch_each_shard_once(server, tmp_path):
    write_shards(tmp_path / "www" / "in", 4)
    index_beside(tmp_path / "www" / "in")
    data = data_module(tmp_path / "x", num_workers=2)
    data.path = f"{server.url}/in"
    names = [name for batch in data.train_dataloader() for name in batch.sample_ids]
    assert len(set(names)) == len(names) == 18
    assert {name: count for name, count in server.gets.items() if name.endswith("tar")} == {
        f"x-{number:03d}.tar": 1 for number in range(4)
    }


def test_a_worker_tells_what_cannot_be_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr("fcmae.data.patience.time.sleep", lambda seconds: None)
    write_shards(tmp_path / "www" / "in", 2)
    index_beside(tmp_path / "www" / "in")
    server.faults |= {"x-000.tar": ["503"] * 99, "x-001.tar": ["503"] * 99}
    data = data_module(tmp_path / "x", num_workers=1)
    data.path = f"{server.url}/in"
    with pytest.raises(UserError, match=r"x-00.\.tar could not be fetched in 7 tries"):
        list(data.train_dataloader())
    gc.collect()  # ends the worker here, not in the middle of another test


# -- the cache --


def test_a_kill_leaves_no_half_file(server, tmp_path):
    write_shards(tmp_path / "www" / "in", 1)
    index_beside(tmp_path / "www" / "in")
    server.faults["x-000.tar"] = ["stall"]
    child = os.fork()
    if not child:
        source(f"{server.url}/in", cache(tmp_path)).open(0)
        os._exit(0)
    part = tmp_path / "cache"
    end = time.monotonic() + 30
    while not any(path.stat().st_size for path in part.glob(".*.part")):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not whole_files(tmp_path)
    assert pictures(source(f"{server.url}/in", cache(tmp_path)), range(6))
    assert not list(part.glob(".*.part"))


def test_what_was_left_behind_is_swept_up(server, tmp_path):
    write_shards(tmp_path / "www" / "in", 1)
    (tmp_path / "cache").mkdir()
    old, young, foreign = (tmp_path / "cache" / name for name in (".shard-0.tar.part", ".shard-1.tar.part", "mine.tar"))
    for path in (old, young, foreign):
        path.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))
    source(f"{server.url}/in/x-000.tar", cache(tmp_path, gib=1e-9))
    assert [path.exists() for path in (old, young, foreign)] == [False, True, True]


def test_the_cache_is_bounded_and_forgets_the_least_used(server, tmp_path):
    paths = write_shards(tmp_path / "www" / "in", 5)
    index_beside(tmp_path / "www" / "in")
    size = paths[0].stat().st_size
    assert {path.stat().st_size for path in paths} == {size}
    kept = cache(tmp_path, gib=3.5 * size / 2**30)
    urls = [f"{server.url}/in/{path.name}" for path in paths]
    files = []
    for number in (0, 1, 2, 0, 3, 4):
        files.append(kept.open(urls[number], version="", size=size, sha256=None))
        time.sleep(0.02)  # clocks of file systems are coarse
        assert len(whole_files(tmp_path)) <= 3
    for file, number in zip(files, (0, 1, 2, 0, 3, 4), strict=True):  # what is open stays
        with file:
            assert file.read() == paths[number].read_bytes()
    before = server.gets.copy()
    for number in (0, 3, 4):
        kept.open(urls[number], version="", size=size, sha256=None).close()
    assert server.gets == before
    kept.open(urls[1], version="", size=size, sha256=None).close()
    assert server.gets["x-001.tar"] == 2
    tiny = cache(tmp_path, gib=1e-9)
    tiny.open(urls[2], version="", size=size, sha256=None).close()
    assert len(whole_files(tmp_path)) == 1  # the newest, though it is too large


def test_threads_share_a_fetch(server, tmp_path):
    path = write_shards(tmp_path / "www" / "in", 1)[0]
    found = []

    def fetch() -> None:
        with cache(tmp_path).open(f"{server.url}/in/{path.name}", version="", size=None, sha256=None) as file:
            found.append(file.read())

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [path.read_bytes()] * 6
    assert server.gets[path.name] == 1


def test_processes_share_a_cache_that_is_too_small(tmp_path):
    paths = write_shards(tmp_path / "www", 4, size=1)
    contents = [path.read_bytes() for path in paths]

    def read_again_and_again(seed: int) -> None:
        numbers = random.Random(seed)
        kept = cache(tmp_path, gib=1e-9, tries=1)
        for _ in range(800):
            number = numbers.randrange(4)
            with kept.open(f"file://{paths[number]}", version="", size=len(contents[number]), sha256=None) as file:
                assert file.read() == contents[number]

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_again_and_again, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_cached_file_may_vanish_at_any_moment(tmp_path, monkeypatch):
    (path,) = write_shards(tmp_path / "www", 1)
    url, size = f"file://{path}", path.stat().st_size
    kept = cache(tmp_path)
    kept.open(url, version="", size=size, sha256=None).close()
    (place,) = whole_files(tmp_path)

    def vanish(*arguments: object) -> None:
        place.unlink(missing_ok=True)

    for function in ("utime", "fstat"):  # another process shrinks the cache in the middle of it
        kept.open(url, version="", size=size, sha256=None).close()
        with monkeypatch.context() as patch:
            real = getattr(os, function)
            moment = lambda *given, real=real: (vanish(), real(*given))[1]  # noqa: E731
            patch.setattr(f"fcmae.data.remote.os.{function}", moment)
            patch.setattr(os, "supports_fd", {os.utime, *os.supports_fd})
            with kept.open(url, version="", size=size, sha256=None) as file:
                assert file.read() == path.read_bytes()


def test_a_cached_file_of_another_size_is_fetched_again(tmp_path):
    (path,) = write_shards(tmp_path / "www", 1)
    kept = cache(tmp_path)
    kept.open(f"file://{path}", version="", size=None, sha256=None).close()
    whole_files(tmp_path)[0].write_bytes(b"half")
    with kept.open(f"file://{path}", version="", size=path.stat().st_size, sha256=None) as file:
        assert file.read() == path.read_bytes()


def test_only_the_very_file_is_discarded(tmp_path):
    (path,) = write_shards(tmp_path / "www", 1)
    kept, url = cache(tmp_path), f"file://{path}"

    def fetched() -> BinaryIO:
        return kept.open(url, version="", size=None, sha256=None)

    first = fetched()
    (place,) = whole_files(tmp_path)
    place.unlink()
    kept.discard(first, url, version="")  # another process was faster
    assert first.closed
    first = fetched()
    place.unlink()
    second = fetched()
    kept.discard(first, url, version="")
    assert whole_files(tmp_path) == [place]
    kept.discard(second, url, version="")
    assert not whole_files(tmp_path)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    path = write_shards(tmp_path / "www" / "in", 1)[0]
    (tmp_path / "file").write_text("")
    kept = RemoteCache(folder=tmp_path / "file" / "cache", gib=1)
    with pytest.raises(UserError, match=r"data.cache_dir=.*file/cache cannot be used \(Not a directory\): free space"):
        kept.open(f"{server.url}/in/{path.name}", version="", size=None, sha256=None)


def test_remote_shards_need_a_folder(server, tmp_path, monkeypatch):
    write_shards(tmp_path / "www" / "in", 2)
    index_beside(tmp_path / "www" / "in")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    data = data_module(tmp_path / "x", cache_dir=None)
    data.path = f"{server.url}/in"
    with pytest.raises(UserError, match=r"there is no folder to keep shards in \(.*\): name one, data.cache_dir=DIR"):
        data.split()


# -- S3 --


@pytest.mark.parametrize("name", ["NoCredentialsError", "PartialCredentialsError"])
def test_without_credentials_another_try_is_hopeless(name):
    tried = []

    def attempt() -> None:
        tried.append(1)
        raise type(name, (Exception,), {})("Unable to locate credentials")

    with pytest.raises(
        UserError, match=rf"s3://b/x.tar cannot be read \({name}: Unable to locate credentials\): check"
    ):
        insist("s3://b/x.tar", attempt, first_wait=0.01)
    assert len(tried) == 1


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server of this machine."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'fcmae[remote]'")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield "s3://bucket"
    running.stop()


def test_shards_come_from_s3(s3, tmp_path):
    import boto3

    paths = write_shards(tmp_path / "in", 3)
    client = boto3.client("s3")
    for path in paths:
        client.upload_file(str(path), "bucket", f"in/{path.name}")
    pattern = f"{s3}/in/x-{{000..002}}.tar"
    assert pictures(source(pattern, cache(tmp_path)), range(18))  # counted
    index_beside(tmp_path / "in")
    client.upload_file(str(tmp_path / "in" / "index.json"), "bucket", "in/index.json")
    data = data_module(tmp_path / "x", num_workers=2)
    data.path = f"{s3}/in"
    assert data.class_names == ["a", "b", "c"]
    names = [name for batch in data.train_dataloader() for name in batch.sample_ids]
    assert len(set(names)) == len(names) == 15 // 3 * 3
    with pytest.raises(UserError, match=r"s3://bucket/in/y.tar cannot be read \(FileNotFoundError"):
        source(f"{s3}/in/y.tar", cache(tmp_path))


def test_s3_without_credentials_ends_at_once(s3, tmp_path, monkeypatch, caplog):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"s3://bucket/in/index.json cannot be read \(NoCredentialsError: Unable to "):
        source(f"{s3}/in/x.tar", cache(tmp_path))
    assert not caplog.records
    s3fs.S3FileSystem.clear_instance_cache()
