"""Images: where they come from, what becomes of them, and which of them a step sees."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import write_images
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from torchvision.transforms import RandomResizedCrop

from fcmae import UserError
from fcmae.data.dataset import ImageDataset
from fcmae.data.digits import Digits
from fcmae.data.folder import Folder, FolderDataModule
from fcmae.data.loader import Normalization
from fcmae.data.picture import Decoded, as_shares, to_tensor
from fcmae.data.randomness import mix_seed
from fcmae.data.sampler import EpochSampler
from fcmae.data.transforms import Crop, RandomCrop, _draw_box

CROP = Crop(crop_scale=[0.2, 1.0], flip=True)
OPTIONS: dict[str, Any] = {
    "image_size": 64,
    "in_chans": 3,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.25, 0.2],
    "batch_size": 5,
    "val_images": 8,
    "augment": CROP,
    "num_workers": 0,
    "max_broken": 0.01,
    "timeout": 600,
    "repeats": 1,
    "samples_per_epoch": None,
    "seed": 0,
}


def folder_data(path: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(path=str(path), **{**OPTIONS, **options})


# -- sources --


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_digits_are_scikit_learns(in_chans, mode):
    digits = Digits(size=(8, 8), in_chans=in_chans)  # as scanned, so that enlarging changes nothing
    assert len(digits) == 1797
    for index in (0, 1000, 1796):
        image = digits.open(index).decode()
        assert (image.mode, image.size) == (mode, (8, 8))
        channel = np.asarray(image.getchannel(in_chans - 1), dtype=float)
        assert np.abs(channel * 16 / 255 - load_digits().images[index]).max() < 0.04  # rounded to 8 bits
    assert digits.sample_id(7) == "digits/7"


def test_digits_are_enlarged_to_height_and_width():
    assert Digits(size=(64, 96), in_chans=1).open(0).decode().size == (96, 64)  # PIL says (width, height)
    with pytest.raises(UserError, match=r"data.in_chans=2: the digits are grey, use 1, or 3"):
        Digits(size=(64, 64), in_chans=2)


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a.webp", "c.tif", "b/d/e.bmp", ".x.png", "b/.y/1.png", "._a.jpg", "z.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(tmp_path / name, "GIF" if name == "z.gif" else None)
    (tmp_path / "notes.txt").write_text("no image")
    folder = Folder(path=tmp_path, in_chans=3)
    names = [folder.sample_id(index) for index in range(len(folder))]
    assert names == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/d/e.bmp", "c.tif"]
    assert all(folder.open(index).decode().size == (9, 7) for index in range(len(folder)))


def _saved(tmp_path: Path, image: Image.Image, kind: str = "png", **options: Any) -> tuple[Image.Image, Image.Image]:
    """What a folder makes of a saved image: (in RGB, in grey)."""
    image.save(tmp_path / f"x.{kind}", **options)
    rgb, grey = (Folder(path=tmp_path, in_chans=channels).open(0).decode() for channels in (3, 1))
    assert (rgb.mode, grey.mode) == ("RGB", "L")
    assert rgb.size == grey.size
    return rgb, grey


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_as_its_camera_says(orientation, tmp_path):
    upright = np.zeros((4, 6), dtype=np.uint8)
    upright[0, 0], upright[0, -1] = 255, 128  # the upper left and the upper right corner
    stored = {  # how the camera stores the upright picture, for each value of the EXIF tag
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    _, grey = _saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.asarray(grey), upright)


GREEN, ITS_GREY = (40, 200, 90), 140  # 0.299 R + 0.587 G + 0.114 B


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("RGB", (5, 4), GREEN), "png"),
        (Image.new("RGBA", (5, 4), (*GREEN, 255)), "png"),
        (Image.new("RGB", (5, 4), GREEN).quantize(), "png"),
        (Image.new("RGB", (5, 4), GREEN).convert("CMYK"), "tiff"),
        (Image.new("RGB", (1, 1), GREEN), "png"),
        (Image.new("RGB", (5, 4), GREEN), "webp"),
        (Image.new("RGB", (16, 16), GREEN), "jpg"),
        (Image.new("RGB", (16, 16), GREEN).convert("CMYK"), "jpg"),
    ],
    ids=["RGB", "RGBA", "palette", "CMYK", "one pixel", "webp", "jpg", "CMYK jpg"],
)
def test_colours_survive(image, kind, tmp_path):
    rgb, grey = _saved(tmp_path, image, kind)
    slack = 0 if kind in ("png", "tiff") else 8  # lossy formats
    assert np.abs(np.asarray(rgb, dtype=int) - GREEN).max() <= slack
    assert np.abs(np.asarray(grey, dtype=int) - ITS_GREY).max() <= slack


@pytest.mark.parametrize("value", [0, 100, 255])
@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_keeps_its_brightness(value, kind, bits, tmp_path):
    pixels = np.full((4, 5), value if bits == 8 else value * 257, dtype=f"uint{bits}")
    Image.fromarray(pixels).save(tmp_path / f"x.{kind}")
    for channels in (3, 1):
        found = to_tensor(Folder(path=tmp_path, in_chans=channels).open(0).decode())
        assert found.shape == (channels, 4, 5)
        assert found.dtype == (torch.uint8 if bits == 8 else torch.float32)
        assert torch.allclose(as_shares(found), torch.full_like(found, value / 255, dtype=torch.float32), atol=1e-7)


# -- split --


def test_the_split_is_disjoint_whole_and_the_same_for_every_seed(tmp_path):
    write_images(tmp_path, 50, size=(8, 8))
    train, held_out = folder_data(tmp_path).split()
    assert len(held_out) == 8
    assert sorted([*train, *held_out]) == list(range(50))
    assert folder_data(tmp_path, seed=123).split() == (train, held_out)
    assert held_out != list(range(8))  # not just the first folder


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 2), (39, 7), (40, 8), (60, 8)])
def test_at_most_a_fifth_is_held_out(count, held_out, tmp_path):
    write_images(tmp_path, count, size=(4, 4))
    assert [len(part) for part in folder_data(tmp_path).split()] == [count - held_out, held_out]


# -- samples --


def _epoch(data: FolderDataModule, epoch: int) -> tuple[torch.Tensor, list[str]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([batch.images for batch in batches]), [name for batch in batches for name in batch.sample_ids]


def test_samples_are_functions_of_seed_epoch_and_index_whatever_the_workers(tmp_path):
    write_images(tmp_path, 30)
    torch.manual_seed(1)
    images, names = _epoch(folder_data(tmp_path), 3)
    torch.manual_seed(2)
    with_workers = _epoch(folder_data(tmp_path, num_workers=2), 3)
    assert torch.equal(images, with_workers[0])
    assert names == with_workers[1]
    for other in (_epoch(folder_data(tmp_path), 4), _epoch(folder_data(tmp_path, seed=1), 3)):
        assert names != other[1]
        shared = [(names.index(name), other[1].index(name)) for name in set(names) & set(other[1])]
        assert not any(torch.equal(images[mine], other[0][its]) for mine, its in shared)  # other crops, too


def test_a_sample_leaves_the_global_random_numbers_alone(tmp_path):
    write_images(tmp_path, 4)
    source = Folder(path=tmp_path, in_chans=3)
    data = ImageDataset(source=source, indices=[0, 1], transform=CROP.train((64, 64)), seed=0)
    before = torch.get_rng_state()
    (sample,) = data[(5, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert (sample.sample_id, sample.broken) == ("001.png", [])


def test_a_broken_image_is_replaced_by_the_next_and_named(tmp_path):
    files = write_images(tmp_path, 5)
    for index in (3, 4):
        files[index].write_bytes(b"no image")
    data = ImageDataset(
        source=Folder(path=tmp_path, in_chans=3),
        indices=[1, 3, 4],
        transform=lambda picture: torch.tensor(picture.size),
        seed=0,
    )
    (sample,) = data[(0, 1)]
    assert sample.sample_id == "001.png"
    assert [name for name, _ in sample.broken] == ["003.png", "004.png"]
    assert all("UnidentifiedImageError" in reason for _, reason in sample.broken)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), unique=True, max_size=20))
def test_mixed_seeds_differ(pairs):
    assert len({mix_seed("a", *pair) for pair in pairs}) == len(pairs)
    assert all(0 <= mix_seed("a", *pair) < 2**64 for pair in pairs)


# -- the order of samples --

geometry = {
    "size": st.integers(24, 60),
    "batch_size": st.integers(1, 4),
    "accumulate": st.integers(1, 3),
    "world_size": st.integers(1, 2),
    "seed": st.integers(0, 3),
}


def _order(epoch: int, **options: int) -> list[int]:
    sampler = EpochSampler(**options)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert all(key[0] == epoch for key in keys)
    return [index for _, index in keys]


@given(epoch=st.integers(0, 5), **geometry)
def test_ranks_share_an_epoch_without_repeating(epoch, world_size, **options):
    ranks = [_order(epoch, world_size=world_size, rank=rank, **options) for rank in range(world_size)]
    seen = [index for rank in ranks for index in rank]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(options["size"]))
    at_once = options["batch_size"] * options["accumulate"] * world_size
    assert len(seen) == options["size"] // at_once * at_once
    assert len({len(rank) for rank in ranks}) == 1
    assert len(EpochSampler(world_size=world_size, **options)) == len(ranks[0])


@given(epoch=st.integers(0, 5), **{**geometry, "world_size": st.just(2)})
def test_ranks_and_accumulation_make_the_same_steps(epoch, world_size, accumulate, **options):
    """What N devices see in a step, one device sees in N accumulated micro-batches."""
    batch = options["batch_size"]
    ranks = [_order(epoch, rank=rank, world_size=2, accumulate=accumulate, **options) for rank in range(2)]
    alone = _order(epoch, accumulate=2 * accumulate, **options)
    micro_batches = [rank[start : start + batch] for start in range(0, len(ranks[0]), batch) for rank in ranks]
    assert [index for micro_batch in micro_batches for index in micro_batch] == alone


@given(**geometry)
def test_every_epoch_has_an_order_of_its_own(**options):
    orders = [tuple(_order(epoch, **options)) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert orders[1] == tuple(_order(1, **options))
    assert orders[1] != tuple(_order(1, **{**options, "seed": options["seed"] + 1}))


@given(steps_done=st.integers(0, 150), **geometry)
def test_a_resumed_run_goes_on_at_its_place(steps_done, **options):
    per_epoch = options["size"] // (options["batch_size"] * options["accumulate"] * options["world_size"])
    epoch, step = divmod(steps_done, per_epoch)
    sampler = EpochSampler(steps_done=steps_done, **options)
    assert sampler.epoch == epoch
    whole = _order(epoch, **options)
    assert [index for _, index in sampler] == whole[step * options["accumulate"] * options["batch_size"] :]
    sampler.set_epoch(epoch + 1)
    assert [index for _, index in sampler] == _order(epoch + 1, **options)


# -- transforms --


@pytest.mark.parametrize(
    ("size", "picture"),
    [((64, 64), (1, 1)), ((64, 64), (300, 20)), ((32, 96), (50, 50)), ((32, 96), (5, 400)), ((96, 32), (400, 5))],
)
def test_transforms_give_the_size_in_uint8(size, picture):
    image = Decoded(Image.new("RGB", picture, (10, 20, 30)))
    for transform in (CROP.train(size), CROP.evaluate(size)):
        tensor = transform(image)
        assert tensor.dtype == torch.uint8
        assert tensor.shape == (3, *size)
        assert tensor.flatten(1).float().std(1).max() == 0
        assert tensor[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (96, 32)])
@pytest.mark.parametrize("picture", [(300, 200), (120, 400), (50, 50)])
def test_crops_are_drawn_as_torchvision_draws_them(size, picture):
    """The same distribution of place, area and aspect; seen in a picture that says where each pixel is from."""
    height, width = picture
    aspect = size[1] / size[0]
    theirs = [
        RandomResizedCrop.get_params(torch.empty(1, height, width), [0.2, 1.0], [3 / 4 * aspect, 4 / 3 * aspect])
        for _ in range(1500)
    ]
    mine = [_draw_box(height, width, [0.2, 1.0], aspect, torch.rand(40).tolist()) for _ in range(1500)]
    assert all(t >= 0 and t + h <= height and x >= 0 and x + w <= width for t, x, h, w in mine)
    for column in (*zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True),):
        assert stats.ks_2samp(*column).pvalue > 1e-4
    ratios = [[box[3] / box[2] for box in boxes] for boxes in (mine, theirs)]
    assert stats.ks_2samp(*ratios).pvalue > 1e-4


def test_no_more_is_left_out_of_a_picture_than_its_crop_can_spare():
    """What is asked of the decoder leaves the crop at least as large as the result, each way."""

    class Asked:
        size = (600, 900)

        def decode(self, at_least):
            self.at_least = at_least
            return torch.zeros(3, *self.size, dtype=torch.uint8)

    for seed in range(50):
        for size in ((64, 64), (32, 96), (224, 160)):
            picture = Asked()
            torch.manual_seed(seed)
            RandomCrop(size, [0.2, 1.0], flip=False)(picture)
            torch.manual_seed(seed)
            _, *numbers = torch.rand(41).tolist()
            _, _, tall, wide = _draw_box(600, 900, [0.2, 1.0], size[1] / size[0], numbers)
            assert picture.at_least[0] * tall / 600 >= size[0]
            assert picture.at_least[1] * wide / 900 >= size[1]
            assert (picture.at_least[0] - 1) * tall / 600 < size[0]  # and no more is asked


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_tensors_are_validated_with_their_centre_too(kind):
    pixels = torch.zeros(13, 60, 180, dtype=kind)
    pixels[:, :, 60:120] = 7
    assert torch.equal(CROP.evaluate((60, 60))(Decoded(pixels)), torch.full((13, 60, 60), 7, dtype=kind))


def test_the_eval_transform_takes_the_centre_every_time():
    pixels = np.full((64, 192), 255, dtype=np.uint8)
    pixels[:, 64:128] = 90
    image = Decoded(Image.fromarray(pixels))
    first, second = (CROP.evaluate((64, 64))(image) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.full((1, 64, 64), 90, dtype=torch.uint8))
    assert CROP.evaluate((64, 192))(image).flatten(1).unique().tolist() == [90, 255]  # all of it


def test_the_train_transform_crops_flips_and_obeys():
    ramp = Decoded(Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))))
    draws = [CROP.train((64, 64))(ramp).float() for _ in range(60)]
    rising = [bool(draw[0, 0, -1] > draw[0, 0, 0]) for draw in draws]
    assert 10 < sum(rising) < 50  # a fair coin misses this once in 10 million
    spans = [float(draw.amax() - draw.amin()) / 255 for draw in draws]
    assert min(spans) < 0.6  # sqrt(0.2 * 3/4) is the narrowest crop
    assert max(spans) > 0.8
    whole = [Crop(crop_scale=[1.0, 1.0], flip=False).train((64, 64))(ramp) for _ in range(10)]
    assert all(bool(draw[0, 0, -1] > draw[0, 0, 0]) for draw in whole)
    assert sum(torch.equal(draw[0], to_tensor(ramp.pixels)[0]) for draw in whole) >= 1


def test_normalize():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    normalised = FolderDataModule(path="images", **OPTIONS).normalize(images)
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    wanted = [(0 - 0.5) / 0.5, (0.2 - 0.4) / 0.25, (1 - 0.3) / 0.2]
    assert torch.allclose(normalised, torch.tensor(wanted).view(1, 3, 1, 1).expand(2, 3, 4, 4))


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (3, 1)])
@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("whole", [255, 1])
def test_normalize_follows_the_formula_to_the_last_bit(size, channels, channels_last, whole):
    images = torch.rand(2, channels, *size)
    images = (256 * images).to(torch.uint8) if whole == 255 else images
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    before, mean, std = images.clone(), torch.rand(channels), torch.rand(channels) + 0.1
    normalize = Normalization(mean.tolist(), std.tolist())
    wanted = (images.float() / whole - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert torch.equal(normalize(images), wanted)
    assert torch.equal(normalize(images[..., 1:]), wanted[..., 1:])  # another width
    assert torch.equal(images, before)


def test_validation_sees_the_same_images_in_the_same_order(tmp_path):
    write_images(tmp_path, 30)
    data = folder_data(tmp_path)
    first, second = ([(batch.images, batch.sample_ids) for batch in data.val_dataloader()] for _ in range(2))
    assert [name for _, names in first for name in names] == [f"{index:03d}.png" for index in data.split()[1]]
    assert all(torch.equal(mine[0], its[0]) for mine, its in zip(first, second, strict=True))


def test_data_sets_can_be_sent_to_workers_that_are_spawned(tmp_path):
    """As they are on macOS; forked workers inherit what cannot be pickled."""
    write_images(tmp_path, 30)
    data = folder_data(tmp_path)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        sent = pickle.loads(pickle.dumps(loader.dataset))
        assert torch.equal(sent[0, 0][0].image, loader.dataset[0, 0][0].image)


def test_links_to_folders_are_followed_once(tmp_path):
    write_images(tmp_path / "elsewhere", 3)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    source = Folder(path=tmp_path / "root", in_chans=3)
    assert [source.sample_id(index) for index in range(len(source))] == [f"class/{index:03d}.png" for index in range(3)]


def test_the_fingerprint_changes_with_the_images(tmp_path):
    files = write_images(tmp_path, 5)
    before = folder_data(tmp_path).fingerprint()
    assert before == folder_data(tmp_path, seed=1).fingerprint()
    files[0].rename(tmp_path / "renamed.png")
    assert folder_data(tmp_path).fingerprint() != before


def test_every_device_needs_a_held_out_image(tmp_path):
    write_images(tmp_path, 10)
    folder_data(tmp_path).check_enough(4, world_size=2, asked_for=False)
    with pytest.raises(UserError, match="2 held-out images are too few for 3 devices"):
        folder_data(tmp_path).check_enough(4, world_size=3, asked_for=False)
