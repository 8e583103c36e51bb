"""Remote shards are asked for before their samples are, in the order in which these come."""

import logging
import multiprocessing.process
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_remote import Server, server
from test_webdataset import data_module, index_beside, write_shards

from fcmae import UserError
from fcmae.data import fetch_ahead
from fcmae.data.fetch_ahead import FetchAhead
from fcmae.data.sampler import EpochSampler, ShardOrder
from fcmae.data.webdataset import WebDatasetDataModule

__all__ = ["server"]  # the fixture


class Orders(list[int]):
    """What a process would be sent."""

    def send(self, shards: list[int]) -> None:
        self.extend(shards)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    sent = Orders()
    monkeypatch.setattr(fetch_ahead, "_start", lambda fetch: sent)
    return sent


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def helpers() -> list[multiprocessing.process.BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name == "fetch-ahead"]


def served(server: Server, tmp_path: Path, *, shards: int) -> WebDatasetDataModule:
    """Shards of six pictures on the server, read one shard after another."""
    write_shards(tmp_path / "www" / "in", shards)
    index_beside(tmp_path / "www" / "in")
    data = data_module(tmp_path / "x", num_workers=0, mixed_shards=1, batch_size=2)
    data.path = f"{server.url}/in"
    return data


def test_shards_are_asked_for_in_their_order_and_never_too_early(orders: Orders) -> None:
    ahead = FetchAhead(lambda shard: None, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), ahead=2)
    ahead.begin(torch.tensor([6, 0, 7, 1, 2, 3, 4, 5]))  # shards 3, 0, 3, 0, 1, 1, 2, 2
    seen = []
    for place in range(8):
        ahead.reach(place)
        seen.append(list(orders))
    assert seen[0] == [3, 0, 1]  # the one being read, and two more
    assert seen[1] == seen[3] == [3, 0, 1, 2]
    assert seen[7] == [3, 0, 1, 2]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    mixed=st.integers(1, 4),
    world_size=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    steps_done=st.integers(0, 4),
    epochs=st.integers(1, 2),
)
def test_every_shard_is_asked_for_before_it_is_read(
    sizes: list[int], mixed: int, world_size: int, batch_size: int, steps_done: int, epochs: int
) -> None:
    shards = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if len(shards) < world_size * batch_size:
        return
    for rank in range(world_size):
        sent = Orders()
        ahead = FetchAhead(lambda shard: None, shards, ahead=mixed)
        ahead._orders = sent  # type: ignore[assignment]
        sampler = EpochSampler(
            size=len(shards),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            steps_done=steps_done,
            order=ShardOrder(sizes, mixed=mixed),
            forecast=ahead,
        )
        for epoch in range(sampler.first_epoch, sampler.first_epoch + epochs):
            sent.clear()
            sampler.set_epoch(epoch)
            read: list[int] = []
            for _, index in sampler:
                read.append(int(shards[index]))
                assert read[-1] in sent
            assert len(sent) == len(set(sent))
            assert set(read) <= set(sent)


def test_a_sampler_gives_the_same_keys_with_a_forecast(orders: Orders) -> None:
    options: dict[str, Any] = {
        "size": 40,
        "batch_size": 3,
        "world_size": 2,
        "rank": 1,
        "accumulate": 2,
        "steps_done": 4,
    }
    ahead = FetchAhead(lambda shard: None, torch.arange(40) // 4, ahead=1)
    alone, told = EpochSampler(**options), EpochSampler(**options, forecast=ahead)
    for epoch in (1, 2):
        alone.set_epoch(epoch)
        told.set_epoch(epoch)
        assert list(alone) == list(told)


def test_the_next_shards_are_fetched_while_the_present_ones_are_read(server: Server, tmp_path: Path) -> None:
    data = served(server, tmp_path, shards=4)

    def fetched() -> set[str]:
        return {name for name, count in server.gets.items() if name.endswith(".tar") and count}

    batches = iter(data.train_dataloader())
    read = {name.partition(":")[0] for name in next(batches).sample_ids}
    assert len(read) == 1
    wait_for(lambda: len(fetched()) == 2)  # the next one too, of which no sample was asked for
    time.sleep(0.3)
    assert len(fetched()) == 2
    for batch in batches:
        read |= {name.partition(":")[0] for name in batch.sample_ids}
    assert read <= fetched()
    assert set(server.gets.values()) == {1}  # nobody fetched what was there


def test_what_cannot_be_fetched_ahead_is_left_to_its_reader(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults |= {f"x-{number:03d}.tar": ["503", "503"] for number in range(3)}
    data = served(server, tmp_path, shards=3)
    with caplog.at_level(logging.WARNING):
        assert len([name for batch in data.train_dataloader() for name in batch.sample_ids]) == 14


def test_a_process_that_is_gone_hinders_nobody(server: Server, tmp_path: Path) -> None:
    data = served(server, tmp_path, shards=4)
    before = set(helpers())
    batches = iter(data.train_dataloader())
    next(batches)
    (process,) = set(helpers()) - before
    process.kill()
    process.join()
    assert len(list(batches)) == len(data.train_dataloader()) - 1


def test_the_process_ends_with_its_loader(server: Server, tmp_path: Path) -> None:
    data = served(server, tmp_path, shards=2)
    before = set(helpers())
    loader = data.train_dataloader()
    assert len(list(loader)) == len(loader)
    (process,) = set(helpers()) - before
    del loader
    process.join(30)
    assert not process.is_alive()


def test_shards_on_a_disk_need_no_process(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2)
    data = data_module(tmp_path / "in", num_workers=0)
    before = set(helpers())
    assert list(data.train_dataloader())
    assert set(helpers()) == before


def test_an_error_of_ours_is_not_swallowed() -> None:
    class Pipe:
        def recv(self) -> list[int]:
            return [0]

        def close(self) -> None:
            pass

    def fetch(shard: int) -> None:
        raise (UserError if shard else KeyError)(shard)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fetch_ahead, "leave_signals_to_the_run", lambda worker: None)
        with pytest.raises(KeyError):
            fetch_ahead._work(Pipe(), Pipe(), fetch)  # type: ignore[arg-type]
