"""Which sample comes when: every one once per pass, in an order of its own, whatever the geometry and the stops."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import write_images
from test_data import OPTIONS, folder_data

from fcmae import UserError
from fcmae.data import loader
from fcmae.data.folder import Folder
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.randomness import mix_seed
from fcmae.data.sampler import EpochSampler, Order, ShardOrder
from fcmae.data.sharded import Places, ShardedDataModule
from fcmae.data.watch import WatchedLoader
from fcmae.errors import TransientError

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def drawn(order: Order, seed: int) -> list[int]:
    return order(torch.Generator().manual_seed(seed)).tolist()


# -- orders --


@given(sizes=sizes, mixed=st.integers(1, 15), seed=st.integers(0, 9))
def test_every_sample_of_every_shard_comes_once_and_few_shards_at_a_time(sizes, mixed, seed):
    order = drawn(ShardOrder(sizes, mixed=mixed), seed)
    assert sorted(order) == list(range(sum(sizes)))
    places = Places(sizes)
    shards = [places[index][0] for index in order]
    left, open_shards = Counter(shards), set()
    for shard in shards:
        open_shards.add(shard)
        assert len(open_shards) <= mixed
        left[shard] -= 1
        if not left[shard]:  # only when all of a group are read, others are opened
            open_shards = {number for number in open_shards if left[number]}
    assert len(places) == sum(sizes)


@given(sizes=sizes)
def test_places_count_through_the_shards(sizes):
    places = Places(sizes)
    assert [places[index] for index in range(sum(sizes))] == [
        (s, i) for s, size in enumerate(sizes) for i in range(size)
    ]


@pytest.mark.parametrize("order", [Order(12), ShardOrder([4, 4, 4], mixed=2), ShardOrder([12], mixed=1)])
def test_every_sample_is_as_likely_first(order):
    first = Counter(drawn(order, seed)[0] for seed in range(3000))
    # 250 each; a deviation is 15.1, and twelve samples stay within 4.5 of them but for one case in ten thousand
    assert all(abs(first[index] - 250) < 4.5 * 15.1 for index in range(12)), first


def test_neighbours_in_a_shard_are_parted():
    order = drawn(ShardOrder([100] * 8, mixed=4), 0)
    together = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert together < 20  # 4 expected of a random order of 400; 792 unshuffled


# -- epochs that are no passes --


def keys(epochs: int, **options: Any) -> list[tuple[int, ...]]:
    sampler = EpochSampler(**options)
    found = []
    for epoch in range(sampler.first_epoch, epochs):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


@given(
    size=st.integers(1, 30),
    samples=st.integers(4, 70),
    batch_size=st.integers(1, 4),
    world_size=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
)
def test_an_endless_stream_leaves_nothing_out(size, samples, batch_size, world_size, seed):
    if samples < batch_size * world_size:
        return
    options = {"size": size, "batch_size": batch_size, "samples_per_epoch": samples, "seed": seed}
    ranks = [keys(5, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    parts = [rank[start : start + batch_size] for start in range(0, len(ranks[0]), batch_size) for rank in ranks]
    stream = [key for part in parts for key in part]
    assert len(stream) == 5 * (samples // (batch_size * world_size)) * batch_size * world_size
    for number in range(len(stream) // size):  # whole passes
        assert sorted(stream[number * size : (number + 1) * size]) == [(number, index) for index in range(size)]


@given(steps_done=st.integers(0, 40), samples=st.integers(4, 50))
def test_a_stream_goes_on_at_its_place(steps_done, samples):
    options = {"size": 13, "batch_size": 2, "accumulate": 2, "samples_per_epoch": samples}
    epochs = steps_done // (samples // 4) + 2
    assert keys(epochs, steps_done=steps_done, **options) == keys(epochs, **options)[4 * steps_done :]


# -- geometry --


def batches(data: Any, **options: Any) -> list[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """(names, seeds, images) of two epochs, from a data module's own loader with its sampler exchanged."""
    found = []
    indices, _ = data.split()
    sampler = EpochSampler(size=len(indices), order=data.order(indices), seed=data.seed, **options)
    loader = data._loader(data.dataset(indices, train=True), sampler, pictures=options["batch_size"])
    for epoch in range(sampler.first_epoch, 2):
        sampler.set_epoch(epoch)
        found += [(batch.sample_ids, batch.seeds, batch.images) for batch in loader]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_another_geometry_sees_the_same_steps(workers, tmp_path):
    """Names, crops and seeds of masks: two ranks with two workers, one rank, one with batches of twice the size."""
    write_images(tmp_path, 40)
    data = folder_data(tmp_path, num_workers=workers)
    alone = batches(data, batch_size=4, accumulate=2)
    ranks = [batches(data, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    larger = batches(data, batch_size=8)
    assert len(alone) == len(dealt) == 16
    for (names, seeds, images), its in zip(alone, dealt, strict=True):
        assert names == its[0]
        assert torch.equal(seeds, its[1])
        assert torch.equal(images, its[2])
    assert torch.equal(torch.cat([seeds for _, seeds, _ in alone]), torch.cat([seeds for _, seeds, _ in larger]))
    assert len(set(torch.cat([seeds for _, seeds, _ in alone]).tolist())) == 64


def test_repeats_fill_a_batch_with_crops_of_fewer_pictures(tmp_path):
    write_images(tmp_path, 20)
    data = folder_data(tmp_path, batch_size=6, repeats=3)
    found = list(data.train_dataloader())
    assert [len(batch.images) for batch in found] == [6] * 8  # 16 pictures, two per batch
    names = [batch.sample_ids for batch in found]
    assert all(batch[0] == batch[1] == batch[2] != batch[3] == batch[4] == batch[5] for batch in names)
    assert len({name for batch in names for name in batch}) == 16
    assert all(len(set(batch.seeds.tolist())) == 6 for batch in found)
    with pytest.raises(UserError, match=r"data.batch_size=5 is no multiple of data.repeats=3: use 3"):
        folder_data(tmp_path, batch_size=5, repeats=3)


def test_an_image_keeps_its_crop_when_others_are_held_out(tmp_path):
    """Its seed follows from its number in the source, not from its place among those to learn from."""
    write_images(tmp_path, 20)
    seen = []
    for val_images in (1, 4):
        data = folder_data(tmp_path, val_images=val_images)
        indices, _ = data.split()
        dataset = data.dataset(indices, train=True)
        seen.append({sample.sample_id: sample for place in range(len(indices)) for sample in dataset[3, place]})
    shared = seen[0].keys() & seen[1].keys()
    assert len(shared) == 16
    assert all(seen[0][name].seed == seen[1][name].seed for name in shared)
    assert all(torch.equal(seen[0][name].image, seen[1][name].image) for name in shared)


def test_a_broken_image_is_reported_once_whatever_the_repeats(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"")
    dataset = folder_data(tmp_path, batch_size=4, repeats=4).dataset([0, 1, 2], train=True)
    assert [name for sample in dataset[0, 1] for name, _ in sample.broken] == ["001.png"]
    assert len(dataset[0, 1]) == 4


def test_seeds_are_told_apart_by_purpose_number_and_length():
    seeds = [("a",), ("a", 0), ("a", 0, 0), ("a", 1), ("a", 1, 0), ("a", 2**32), ("a", 0, 1), ("b", 1), ("a 1",)]
    assert len({mix_seed(*seed) for seed in seeds}) == len(seeds)
    assert mix_seed("a", 1) == 12444202034427101082


def test_too_short_an_epoch_is_refused(tmp_path):
    write_images(tmp_path, 20)
    data = folder_data(tmp_path, samples_per_epoch=4)
    with pytest.raises(UserError, match=r"data\.samples_per_epoch=4 are fewer than one effective batch of 5"):
        data.check_enough(5, world_size=1, asked_for=False)
    assert len(list(folder_data(tmp_path, samples_per_epoch=50).train_dataloader())) == 10
    with pytest.raises(UserError, match=r"data.samples_per_epoch=0 must be at least 1"):
        folder_data(tmp_path, samples_per_epoch=0)


class Sharded(Folder):
    """A folder's images as if they lay in shards of three."""

    class_names: list[str] = []  # noqa: RUF012
    labels = None
    held_out = None

    @property
    def shard_sizes(self) -> list[int]:
        return [min(3, len(self) - start) for start in range(0, len(self), 3)]

    @property
    def shard_names(self) -> list[str]:
        return [f"{number}.tar" for number in range(len(self.shard_sizes))]

    def fetcher(self) -> None:
        pass


class ShardedData(ShardedDataModule):
    def load_source(self) -> Any:
        return Sharded(path=self.folder, in_chans=3)


def sharded(folder: Path, **options: Any) -> ShardedData:
    given = {
        **OPTIONS,
        "fraction": 1.0,
        "shots": None,
        "sampling": "uniform",
        "mixed_shards": 2,
        "cache_dir": None,
        "cache_gib": 1,
        **options,
    }
    ShardedData.folder = folder
    return ShardedData(**given)


def test_shards_hold_out_their_last_samples_and_know_which_are_left(tmp_path):
    write_images(tmp_path, 20)
    data = sharded(tmp_path, val_images=4)
    train, held_out = data.split()
    assert (list(train), list(held_out)) == (list(range(16)), [16, 17, 18, 19])
    order = data.order(train)
    assert order.sizes.tolist() == [3, 3, 3, 3, 3, 1]
    assert order.mixed == 2
    assert (
        data.fingerprint() != sharded(tmp_path / ".." / tmp_path.name, val_images=4, mixed_shards=1).fingerprint()[1:]
    )
    with pytest.raises(UserError, match=r"the images have no labels; they can be pre-trained on"):
        _ = data.labels
    with pytest.raises(UserError, match=r"data\.mixed_shards=0 must be at least 1"):
        sharded(tmp_path, mixed_shards=0)
    assert isinstance(data, LabelledDataModule)


@pytest.mark.parametrize(
    ("usable", "ranks", "step", "workers"),
    [
        (64, 8, {}, 8),
        (16, 8, {}, 2),
        (4, 8, {}, 1),
        (8, 8, {"SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound by srun
        (64, 8, {"SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "4"}, 8),  # not bound
        (16, 4, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "16"}, 4),  # one task, whose ranks share its cores
    ],
)
def test_ranks_share_the_cores_of_a_machine(usable, ranks, step, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "usable_cores", lambda: usable)
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    write_images(tmp_path, 6)
    dataset = folder_data(tmp_path).dataset(range(6), train=False)
    opened = loader.open_loader(dataset, [(0, 0)], batch_size=1, num_workers="auto", local_ranks=ranks)
    assert opened.num_workers == workers


# -- workers that die or hang --


class Stuck(Folder):
    def open(self, index: int) -> Any:
        name = self.sample_id(index)
        if name == "003.png":
            if self.path.name == "dies":
                import os

                os._exit(7)
            time.sleep(60)
        return super().open(index)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the workers killed here
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dies", r"a process that reads images died while it read 003\.png: .*leave it out"),
        ("hangs", r"no batch came for 3 seconds while the processes read (.*, )?003\.png.*data\.timeout"),
    ],
)
def test_the_picture_at_which_a_worker_stops_is_named(what, message, tmp_path):
    write_images(tmp_path / what, 6)
    data = folder_data(tmp_path / what, num_workers=2, timeout=3)
    dataset = data.dataset(range(6), train=False)
    dataset.source = Stuck(path=tmp_path / what, in_chans=3)
    loader = data._loader(dataset, [(0, position) for position in range(6)], pictures=1)
    assert isinstance(loader, WatchedLoader)
    with pytest.raises(UserError, match=message):
        list(loader)
    for worker in getattr(loader._iterator, "_workers", []):
        worker.kill()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the workers killed here
def test_a_worker_that_dies_during_a_step_is_told_when_the_next_batch_is_asked_for(tmp_path):
    """torch's handler would raise in the midst of the step."""
    write_images(tmp_path, 30)
    data = folder_data(tmp_path, num_workers=2)
    data.batch_size = 2
    batches = iter(data._loader(data.dataset(range(30), train=False), [(0, n) for n in range(30)], pictures=1))
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(1)  # a step
    with pytest.raises(TransientError, match="a process that reads images died while it read"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "3 steps, each image once; 2 are left out, others in each epoch"),
        ({"batch_size": 7}, "2 steps, each image once"),
        ({"batch_size": 4, "repeats": 2}, "7 steps, each image once, 2 crops of it"),
        ({"samples_per_epoch": 50}, "12 steps, the next 48 samples of an endless stream of passes"),
    ],
)
def test_what_an_epoch_is_is_said(options, line, tmp_path):
    write_images(tmp_path, 17)
    data = folder_data(tmp_path, **{"batch_size": 4, "val_images": 3} | options)
    assert len(data.split()[0]) == 14
    assert data.epoch_line(data.batch_size) == line
