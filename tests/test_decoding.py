"""Files of every kind to pixels: what people expect to see, and a reason for what cannot be read."""

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fcmae import UserError
from fcmae.data.dataset import ImageDataset
from fcmae.data.decoding import ChannelsError, open_picture
from fcmae.data.hf_columns import stored_picture
from fcmae.data.picture import Decoded, as_shares, to_tensor
from fcmae.data.source import Sample, collate
from fcmae.data.transforms import Crop, RandomCrop

GREEN = (40, 200, 90)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def decode(file: bytes, name: str, in_chans: int) -> Tensor:
    picture = open_picture(file, name=name, in_chans=in_chans)
    pixels = to_tensor(picture.decode())
    assert pixels.shape == (in_chans, *picture.size)
    assert pixels.dtype in (torch.uint8, torch.float32)
    return pixels


def numbers(*shape: int, kind: str = "uint8") -> Any:
    return np.random.default_rng(0).integers(0, 200, shape).astype(kind)


def photo(width: int, height: int, quality: int = 90) -> bytes:
    image = Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(image, "JPEG", quality=quality)


# -- what people see --


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (4, 2), (*GREEN, 0))
    image.paste((*GREEN, 255), (0, 0, 2, 2))
    file = encoded(image.quantize() if mode == "PA" else image.convert(mode), "PNG")
    pixels = decode(file, "x.png", 3)
    seen = GREEN if mode != "LA" else (140, 140, 140)
    assert pixels[:, 0, 0].tolist() == pytest.approx(seen, abs=1)
    assert pixels[:, 0, 3].tolist() == [255, 255, 255]
    assert decode(file, "x.png", 1)[:, 0].tolist()[0] == pytest.approx([140, 140, 255, 255], abs=1)


def test_half_transparent_is_half_white():
    assert decode(encoded(Image.new("RGBA", (1, 1), (0, 100, 200, 128)), "PNG"), "x.png", 3).flatten().tolist() == (
        pytest.approx([127, 177, 227], abs=1)
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, (0, 0, 0), (255, 255, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(file, f"x.{kind.lower()}", 3).flatten(1).unique(dim=1).flatten().tolist() == list(GREEN)


def test_the_size_is_known_before_anything_is_decoded_and_turned_as_the_camera_says():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = encoded(Image.fromarray(numbers(32, 64, 3)), "JPEG", exif=exif)
        picture = open_picture(file[:-400], name="x.jpg", in_chans=3)  # the end is missing
        assert picture.size == ((64, 32) if orientation > 4 else (32, 64))
        with pytest.raises(OSError, match="truncated"):
            picture.decode()
        whole = open_picture(file, name="x.jpg", in_chans=3)
        assert to_tensor(whole.decode((1, 1))).shape[1:] == torch.Size([side // 8 for side in whole.size])


# -- more bits, more channels --


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_are_kept(kind, in_chans):
    array = numbers(5, 7, kind="uint16") * 300 + 7
    file = encoded(Image.fromarray(array), "PNG") if kind == "png" else tiff(array)
    pixels = decode(file, f"x.{kind}", in_chans)
    assert torch.equal(pixels, torch.from_numpy(array.astype(np.float32) / 65535).expand(in_chans, -1, -1))


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "float64"])
def test_thirteen_bands_are_read_as_they_are(kind, planar):
    array = numbers(13, 6, 9, kind=kind)
    file = (
        tiff(array, photometric="minisblack", planarconfig="separate")
        if planar
        else tiff(array.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    )
    scale = 65535 if kind == "uint16" else 1
    pixels = decode(file, "x.tiff", 13)
    assert pixels.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
    assert torch.allclose(pixels.float(), torch.from_numpy(array.astype(np.float32) / scale), atol=1e-7)
    for transform in (
        Crop(crop_scale=[0.2, 1], flip=True).train((32, 64)),
        Crop(crop_scale=[1, 1], flip=False).evaluate((32, 64)),
    ):
        assert transform(Decoded(pixels)).shape == (13, 32, 64)
        assert transform(Decoded(pixels)).dtype == pixels.dtype


@pytest.mark.parametrize("kind", ["int32", "uint32", "float32"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_thirty_two_bits_keep_their_values(kind, in_chans):
    array = numbers(4, 4, kind=kind) * 1000
    expected = torch.from_numpy(array.astype(np.float32)).expand(in_chans, -1, -1)
    assert torch.equal(decode(tiff(array), "x.tif", in_chans), expected)
    assert torch.equal(decode(npy(array), "x.npy", in_chans), expected)


def test_sixteen_bits_in_colour():
    array = numbers(5, 6, 3, kind="uint16") * 256
    pixels = decode(tiff(array, photometric="rgb"), "x.tif", 3)
    assert torch.equal(pixels, torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32) / 65535))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_white_is_white_whatever_the_number_of_bits(in_chans):
    array = numbers(5, 6)
    wanted = torch.from_numpy(255 - array).expand(in_chans, -1, -1)
    assert torch.equal(decode(tiff(array, photometric="miniswhite"), "x.tif", in_chans), wanted)
    sixteen = decode(tiff(array.astype(np.uint16) * 257, photometric="miniswhite"), "x.tif", in_chans)
    assert torch.allclose(sixteen, as_shares(wanted))
    more = decode(tiff(array.astype(np.uint32), photometric="miniswhite"), "x.tif", in_chans)
    assert torch.allclose(more, torch.tensor(2.0**32 - 1) - torch.from_numpy(array.astype(np.float32)))
    signed = numbers(5, 6, kind="int16")  # which way round these are nobody says
    found = decode(tiff(signed, photometric="miniswhite"), "x.tif", in_chans)
    assert torch.equal(found, torch.from_numpy(signed.astype(np.float32)).expand(in_chans, -1, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_tiff_is_turned_as_its_camera_says(kind, orientation):
    array = numbers(4, 6, kind=kind)
    upright = [array, array[:, ::-1], array[::-1, ::-1], array[::-1]]
    upright += [array.T, np.rot90(array, -1), array.T[::-1, ::-1], np.rot90(array)]
    file = tiff(array, photometric="minisblack", extratags=[(274, "H", 1, orientation, True)])
    wanted = torch.from_numpy(upright[orientation - 1].astype(np.float32)) / (65535 if kind == "uint16" else 1)
    assert torch.equal(decode(file, "x.tif", 3).float(), wanted.expand(3, -1, -1))
    if kind != "uint8":
        bands = tiff(np.stack([array, array]), photometric="minisblack", extratags=[(274, "H", 1, orientation, True)])
        assert torch.equal(decode(bands, "x.tif", 2), wanted.expand(2, -1, -1))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_of_several_pages_the_first_unless_they_are_the_bands(kind):
    for pages in (3, 5):
        array = numbers(pages, 6, 9, kind=kind)
        values = torch.from_numpy(array.astype(np.float32)) / (65535 if kind == "uint16" else 1)
        stack = tiff(array, photometric="minisblack")
        for in_chans in (1, 3) if kind == "uint8" else (1,):
            assert torch.equal(decode(stack, "x.tif", in_chans).float(), values[:1].expand(in_chans, -1, -1))
        if kind != "uint8":  # as grey in three channels they are hardly meant
            with pytest.raises(ChannelsError, match=f"{pages} pages of one channel each, not data.in_chans=3"):
                decode(stack, "x.tif", 3)
        if pages == 5:
            assert torch.equal(decode(stack, "x.tif", 5).float(), values)
    frames = numbers(5, 6, 9, 4, kind=kind)
    first = decode(tiff(frames, photometric="rgb"), "x.tif", 4)
    assert torch.equal(first, decode(tiff(frames[0], photometric="rgb"), "x.tif", 4))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(8, 6, 13), (6, 8, 2), (6, 13, 13), (1, 6, 5), (6, 1, 5)])
def test_an_array_that_tifffile_has_written_row_by_row_is_read_as_it_was(shape, kind, compression):
    array = numbers(*shape, kind=kind)
    file = tiff(array, compression=compression)
    with tifffile.TiffFile(io.BytesIO(file)) as opened:
        assert (len(opened.pages), opened.pages.first.shape) == (shape[0], shape[1:])
    values = torch.from_numpy(array.astype(np.float32)) / (65535 if kind == "uint16" else 1)
    assert torch.equal(decode(file, "x.tif", shape[2]).float(), values.permute(2, 0, 1))
    # Nothing else is: other numbers of channels, and as many pages as channels, which are the bands.
    with pytest.raises(ChannelsError, match=f"not data.in_chans={shape[2] + 2}"):
        decode(file, "x.tif", shape[2] + 2)
    square = numbers(13, 6, 13, kind=kind)
    bands = torch.from_numpy(square.astype(np.float32)) / (65535 if kind == "uint16" else 1)
    assert torch.equal(decode(tiff(square, compression=compression), "x.tif", 13).float(), bands)


@pytest.mark.parametrize("arrays", [[(8, 6, 13), (1, 6, 13)], [(2, 4, 6, 13)], [(8, 6, 13), (9, 9)]])
def test_pages_that_are_no_rows_of_one_array_are_refused(arrays):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for shape in arrays:
            writer.write(numbers(*shape, kind="uint16"), photometric="minisblack")
    with pytest.raises(ChannelsError, match=r"1 channels \(shape of a page: \(6, 13\)\), not data.in_chans=13"):
        decode(file.getvalue(), "x.tif", 13)


def test_the_planes_of_one_page_are_its_colours():
    array = numbers(3, 6, 9, kind="uint16")
    pixels = decode(tiff(array, photometric="rgb", planarconfig="separate"), "x.tif", 3)
    assert torch.equal(pixels, torch.from_numpy(array.astype(np.float32) / 65535))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("alpha", [None, "unassalpha", "assocalpha"])
@pytest.mark.parametrize("colours", [1, 3])
def test_sixteen_bits_look_as_eight_do(colours, alpha, in_chans):
    array = numbers(6, 9, colours + bool(alpha))
    if alpha == "assocalpha":
        array[..., :-1] = np.minimum(array[..., :-1], array[..., -1:])
    options = {"extrasamples": [alpha]} if alpha else {}
    if array.shape[2] == 1:
        array = array[..., 0]
    else:
        options["planarconfig"] = "contig"
    photometric = "rgb" if colours == 3 else "minisblack"
    sixteen = decode(tiff(array.astype(np.uint16) * 257, photometric=photometric, **options), "x.tif", in_chans)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[colours + bool(alpha)]
    straight = array.astype(np.float64)
    if alpha == "assocalpha":
        straight[..., :-1] *= 255 / np.maximum(straight[..., -1:], 1)
    png = encoded(Image.fromarray(straight.round().astype(np.uint8), mode), "PNG")
    eight = as_shares(decode(png, "x.png", in_chans))
    assert torch.allclose(sixteen, eight, atol=2 / 255)
    assert sixteen.unique().numel() > 20


def test_alpha_of_numbers_without_a_white_is_refused():
    file = tiff(numbers(6, 9, 4, kind="float32"), photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(ChannelsError, match="4 channels"):
        decode(file, "x.tif", 3)
    assert decode(file, "x.tif", 4).shape == (4, 6, 9)


@pytest.mark.parametrize("largest", [65535, 4095, 1000])
@pytest.mark.parametrize("plain", [True, False])
def test_a_ppm_of_sixteen_bits_gives_shares_of_its_largest_value(largest, plain):
    array = np.array([[0, largest // 3, largest]], dtype=">u2")
    values = " ".join(map(str, array[0].tolist())).encode() if plain else array.tobytes()
    file = b"P%d 3 1 %d\n" % (2 if plain else 5, largest) + values
    for in_chans in (1, 3):
        wanted = torch.from_numpy(array.astype(np.float32) / largest).expand(in_chans, -1, -1)
        assert torch.allclose(decode(file, "x.ppm", in_chans), wanted, atol=1e-5)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [True, False])
def test_a_cell_without_a_path_is_known_as_a_tiff(order, big):
    array = numbers(13, 6, 9, kind="uint16")
    cell = tiff(array, photometric="minisblack", planarconfig="separate", byteorder=order, bigtiff=big)
    pixels = stored_picture({"bytes": cell, "path": None}, in_chans=13).decode()
    assert torch.equal(to_tensor(pixels), torch.from_numpy(array.astype(np.float32) / 65535))


@pytest.mark.parametrize(
    ("shape", "in_chans"), [((5, 6), 1), ((5, 6, 4), 4), ((4, 5, 6), 4), ((5, 6, 1), 1), ((1, 5, 6), 1), ((5, 6), 3)]
)
def test_arrays_of_either_layout(shape, in_chans):
    array = numbers(*shape)
    pixels = decode(npy(array), "x.npy", in_chans)
    wanted = array if array.ndim == 2 else array.transpose(2, 0, 1) if shape[0] == 5 else array
    assert torch.equal(pixels, torch.from_numpy(wanted.reshape(-1, 5, 6)).expand(in_chans, 5, 6))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_version_from_a_path_or_bytes(version, order, tmp_path):
    array = np.asarray(numbers(5, 6, 4, kind=">f4"), order=order)
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    for file in (path, path.read_bytes()):
        pixels = to_tensor(open_picture(file, name="x.npy", in_chans=4).decode())
        assert torch.equal(pixels, torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1))


def test_four_channels_of_a_png_are_its_own():
    array = numbers(3, 4, 4)
    assert torch.equal(
        decode(encoded(Image.fromarray(array), "PNG"), "x.png", 4), torch.from_numpy(array.transpose(2, 0, 1))
    )


# -- refused, with a reason --


def bomb() -> bytes:
    """A PNG of 400 megapixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


class Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


BROKEN = {
    "nothing.jpg": (b"", 3, "cannot identify"),
    "text.jpg": (b"This is no picture.\n" * 9, 3, "cannot identify"),
    "half.jpg": (photo(200, 100)[:2000], 3, "truncated"),
    "half.png": (encoded(Image.fromarray(numbers(50, 50, 3)), "PNG")[:3000], 3, "truncated"),
    "half.webp": (encoded(Image.fromarray(numbers(50, 50, 3)), "WEBP")[:700], 3, "could not"),
    "half.tif": (tiff(numbers(13, 60, 60), photometric="minisblack")[:20000], 13, "."),
    "bomb.png": (bomb(), 3, "decompression bomb"),
    "nothing.npy": (b"", 3, "reading magic string"),
    "objects.npy": (npy(np.array([[Hostile()]], dtype=object)), 1, "type object are no numbers"),
    "words.npy": (npy(np.array([["a", "b"]])), 1, "no numbers"),
    "nan.npy": (npy(np.array([[1.0, np.nan]])), 1, "no finite numbers"),
    "huge.npy": (npy(np.array([[1.0, 1e300]])), 1, "no finite numbers"),
    "fields.npy": (npy(np.zeros((2, 3), dtype=[("a", "u1"), ("b", "u1")])), 1, "no numbers"),
    "half.npy": (npy(numbers(50, 50))[:900], 1, "."),
    "volume.npy": (npy(numbers(2, 3, 4, 5)), 1, r"shape \(2, 3, 4, 5\), not data.in_chans=1"),
    "empty.npy": (npy(numbers(0, 5)), 1, "shape"),
    "bands.tif": (tiff(numbers(13, 6, 9), photometric="minisblack"), 12, r", not data.in_chans=12"),
    "bands.png": (encoded(Image.new("RGB", (3, 3)), "PNG"), 4, r"3 channels \(RGB\), not data.in_chans=4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, in_chans, reason = BROKEN[name]
    with pytest.raises(Exception, match=reason):
        open_picture(file, name=name, in_chans=in_chans).decode()
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("kind", ["tif", "rows.tif", "npy"])
def test_too_many_pixels_are_refused_before_they_are_read_as_pil_refuses_others(kind, monkeypatch):
    array = numbers(13, 11, 2)
    planes = {} if kind == "rows.tif" else {"planarconfig": "contig"}
    file = npy(array) if kind == "npy" else tiff(array, photometric="minisblack", **planes)
    assert decode(file, f"x.{kind}", 2).shape == (2, 13, 11)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 71)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", None)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match="13 x 11 pixels are more than 142"):
        open_picture(file, name=f"x.{kind}", in_chans=2)


@pytest.mark.parametrize(
    ("shape", "options", "in_chans"),
    [
        ((6, 9, 60), {"photometric": "minisblack", "planarconfig": "contig"}, 3),
        ((60, 6, 9), {"photometric": "minisblack", "planarconfig": "separate"}, 3),
        ((6, 9, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, 3),  # a fourth band, not alpha
        ((6, 9, 3), {"photometric": "minisblack", "planarconfig": "contig"}, 1),  # bands, not colours
        ((5, 6, 9), {"photometric": "minisblack"}, 4),
    ],
)
def test_channels_are_compared_before_a_tiff_is_decoded(shape, options, in_chans, monkeypatch):
    file = tiff(numbers(*shape, kind="uint16"), **options)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    with pytest.raises(ChannelsError, match=f", not data.in_chans={in_chans}"):
        open_picture(file, name="x.tif", in_chans=in_chans)


def test_pages_of_several_sizes_are_no_bands():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for side in (8, 4):
            writer.write(numbers(side, side, kind="uint16"))
    with pytest.raises(ChannelsError, match=r"2 channels \(shape of a page: \(8, 8\)\), not data.in_chans=2"):
        decode(file.getvalue(), "x.tif", 2)
    assert decode(file.getvalue(), "x.tif", 1).shape == (1, 8, 8)


class Zoo:
    """The broken ones, and one picture that can be read."""

    names = (*(name for name, (_, in_chans, _) in BROKEN.items() if in_chans == 3), "good.jpg")

    def __len__(self) -> int:
        return len(self.names)

    def sample_id(self, index: int) -> str:
        return self.names[index]

    def open(self, index: int) -> Any:
        name = self.names[index]
        file = photo(90, 60) if name == "good.jpg" else BROKEN[name][0]
        return open_picture(file, name=name, in_chans=3)


def test_a_data_set_passes_over_all_of_them_by_name():
    dataset = ImageDataset(
        source=Zoo(), indices=range(len(Zoo.names)), transform=RandomCrop((32, 32), [1, 1], False), seed=0
    )
    (sample,) = dataset[0, 0]
    assert sample.sample_id == "good.jpg"
    assert [name for name, _ in sample.broken] == list(Zoo.names[:-1])
    assert all(reason and "\n" not in reason for _, reason in sample.broken), sample.broken


def test_a_mistake_of_the_transform_is_not_the_pictures():
    def fails(picture: Any) -> Tensor:
        picture.decode()
        raise ZeroDivisionError

    dataset = ImageDataset(source=Zoo(), indices=[len(Zoo.names) - 1], transform=fails, seed=0)
    with pytest.raises(ZeroDivisionError):
        dataset[0, 0]


def test_a_users_error_of_the_source_stops_everything():
    class Gone(Zoo):
        def open(self, index: int) -> Any:
            raise UserError("the disk is gone")

    dataset = ImageDataset(source=Gone(), indices=[0], transform=RandomCrop((32, 32), [1, 1], False), seed=0)
    with pytest.raises(UserError, match="the disk is gone"):
        dataset[0, 0]


# -- no more of a JPEG than is needed --


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    at_least=st.tuples(st.integers(1, 320), st.integers(1, 320)),
    turned=st.booleans(),
)
def test_a_reduced_picture_is_never_too_small(width, height, at_least, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    picture = open_picture(encoded(Image.new("RGB", (width, height)), "JPEG", exif=exif), name="x.jpg", in_chans=3)
    assert picture.size == ((width, height) if turned else (height, width))
    found = to_tensor(picture.decode(at_least)).shape[1:]
    for side, least, whole in zip(found, at_least, picture.size, strict=True):
        assert side >= min(least, whole)
        assert whole >= side > whole / 8 - 1e-9


@pytest.mark.parametrize(
    ("turned", "at_least", "found"),
    [
        (True, (400, 50), (400, 200)),
        (True, (100, 400), (800, 400)),
        (False, (50, 400), (200, 400)),
        (False, (400, 100), (400, 800)),
    ],
)
def test_how_small_a_turned_picture_may_be_is_asked_of_its_sides_as_seen(turned, at_least, found):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    picture = open_picture(encoded(Image.new("RGB", (800, 400)), "JPEG", exif=exif), name="x.jpg", in_chans=3)
    assert to_tensor(picture.decode(at_least)).shape == (3, *found)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_crops_of_a_reduced_picture_are_those_of_the_whole_one(size):
    """Red counts columns and green counts rows, so that a crop says where it is from."""
    ramp = np.zeros((900, 1200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 1200)[None], np.linspace(0, 255, 900)[:, None]
    file = encoded(Image.fromarray(ramp), "JPEG", quality=98, subsampling=0)
    whole = Decoded(open_picture(file, name="x.jpg", in_chans=3).decode())
    reduced = 0
    for seed in range(20):
        picture = open_picture(file, name="x.jpg", in_chans=3)
        views = []
        for seen in (picture, whole):
            torch.manual_seed(seed)
            views.append(RandomCrop(size, [0.2, 1.0], flip=True)(seen).float())
        assert (views[0] - views[1])[:2].abs().max() <= 3  # two pixels of a picture at 1/4
        reduced += to_tensor(picture.decode()).shape[1] < 900
    assert reduced == 20


def test_a_photo_looks_alike_when_it_is_reduced():
    """Compared with the same part of the whole picture, whose bounds are those of the reduced picture's pixels."""
    file = photo(2000, 1500)
    whole = to_tensor(open_picture(file, name="x.jpg", in_chans=3).decode())
    for box in ((0, 0, 1500, 2000), (104, 208, 1200, 1600), (640, 320, 704, 1008)):
        enough = (math.ceil(1500 * 224 / box[2]), math.ceil(2000 * 224 / box[3]))
        reduced = to_tensor(open_picture(file, name="x.jpg", in_chans=3).decode(enough))
        factor = 1500 // reduced.shape[1]
        assert factor > 1
        views = []
        for pixels, scale in ((reduced, factor), (whole, 1)):
            top, left, tall, wide = (side // scale for side in box)
            part = pixels[:, top : top + tall, left : left + wide]
            views.append(F.resize(part, [224, 224], InterpolationMode.BICUBIC, antialias=True).float())
        difference = float((views[0] - views[1]).abs().mean())
        assert 0 < difference < 3  # of 255


def test_repeats_are_several_crops_of_one_decoded_picture():
    opened = []

    class Counted(Zoo):
        def open(self, index: int) -> Any:
            opened.append(index)
            return super().open(index)

    dataset = ImageDataset(
        source=Counted(),
        indices=[len(Zoo.names) - 1],
        transform=RandomCrop((32, 32), [0.2, 1], True),
        seed=0,
        repeats=3,
    )
    samples = dataset[4, 0]
    assert len(opened) == 1
    assert len(samples) == len({sample.seed for sample in samples}) == 3
    assert not torch.equal(samples[0].image, samples[1].image)
    assert all(torch.equal(a.image, b.image) for a, b in zip(samples, dataset[4, 0], strict=True))


def test_files_of_several_types_make_one_batch():
    eight = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    sixteen = torch.full((1, 2, 2), 0.5)
    batch = collate([[Sample(eight, "a", 1, [])], [Sample(sixteen, "b", 2, [])]])
    assert torch.equal(batch.images, torch.stack([as_shares(eight), sixteen]))
    assert batch.seeds.tolist() == [1, 2]


def test_a_batch_lies_in_memory_as_its_pictures_do():
    planes = [torch.from_numpy(numbers(3, 5, 7)) for _ in range(2)]
    pixels = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in planes]
    for images, layout in (
        (planes, torch.contiguous_format),
        (pixels, torch.channels_last),
        ([pixels[0], planes[1]], torch.channels_last),
    ):
        batch = collate([[Sample(image, "", 1, [])] for image in images]).images
        assert batch.is_contiguous(memory_format=layout)
        assert torch.equal(batch, torch.stack(planes))
    crop = RandomCrop((32, 48), [0.2, 1], flip=True)
    crops = [crop(open_picture(photo(90, 60), name="x.jpg", in_chans=3)) for _ in range(8)]
    batch = collate([[Sample(image, "", 1, [])] for image in crops]).images
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack(crops))


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data with (tag, type, count, value) entries, right or wrong."""
    head = struct.pack(">2sHLH", b"MM", 42, 8, len(entries))
    return b"Exif\0\0" + head + b"".join(struct.pack(">HHL", *entry[:3]) + entry[3] for entry in entries) + bytes(68)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param((0x0102, 2, 4, b"abc\0"), id="bits per sample in letters"),
        pytest.param((0x011A, 7, 4, b"\0\6\0\0"), id="a resolution of no type"),
        pytest.param((0x8769, 4, 1, b"\xff\xff\xff\0"), id="a directory out of the file"),
        pytest.param((0x8825, 3, 1, b"\0\6\0\0"), id="a place on earth that is a number"),
    ],
)
def test_a_photograph_is_turned_whatever_else_its_camera_wrote(entry):
    turn = (0x0112, 3, 1, b"\0\6\0\0")
    exif = exif_of(*sorted([turn, entry]))
    file = encoded(Image.fromarray(numbers(32, 64, 3)), "JPEG", exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        wanted = np.asarray(opened.transpose(Image.Transpose.ROTATE_270))
    found = open_picture(file, name="x.jpg", in_chans=3)
    assert found.size == (64, 32)
    assert np.array_equal(np.asarray(found.decode()), wanted)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0"])
def test_a_photograph_whose_camera_wrote_nonsense_is_taken_as_it_is(exif):
    file = encoded(Image.fromarray(numbers(32, 64, 3)), "JPEG", exif=exif)
    assert open_picture(file, name="x.jpg", in_chans=3).decode().size == (64, 32)
