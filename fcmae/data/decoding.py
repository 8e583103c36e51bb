"""Picture files to pixels: JPEG, PNG, WebP, TIFF, BMP, PPM and NumPy arrays, of any number of channels."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcmae.data.picture import Decoded, Picture, Pixels, as_shares

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the tag of EXIF and TIFF, and its values that swap height and width
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FLIPPED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # and the axes of (C, H, W) to flip after that
_WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
_ALPHA, _PREMULTIPLIED = ((1,), (2,)), (1,)  # TIFF's ExtraSamples: alpha alone
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as PIL makes it
_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La")


class ChannelsError(ValueError):
    """A file has other channels than those asked for."""


def open_picture(file: str | Path | bytes, *, name: str, in_chans: int) -> Picture:
    """A picture from a file or from a file's bytes.

    One and three channels are what people see: turned as the EXIF orientation says, grey or in colour, the first
    frame of several, transparent parts on white. Any other number must be the file's own.

    Args:
        file: where it is, or what is in it.
        name: of the file; its extension tells arrays and TIFFs from the rest.
        in_chans: channels to give.

    Raises:
        ChannelsError: it has another number of channels.
        Exception: whatever the decoder raises on a broken file.
    """
    extension = Path(name).suffix.lower()
    if extension == ".npy":
        return Decoded(_read_array(file, in_chans))
    if extension in (".tif", ".tiff") and not _plain(file, in_chans):
        return Decoded(_read_tiff(file, in_chans))
    if in_chans not in _MODES:
        image = _open(file)
        bands = len(image.getbands())
        if bands != in_chans or image.mode not in ("LA", "RGBA", "CMYK"):
            raise ChannelsError(f"{bands} channels ({image.mode}), not data.in_chans={in_chans}")
        return Decoded(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return _Encoded(_open(file), _MODES[in_chans])


class _Encoded:
    """A picture that is decoded when it is known how large it must be."""

    def __init__(self, image: Image.Image, mode: str) -> None:
        self._image = image
        self._mode = mode
        if image.format == "TIFF":
            image.load()  # turns it, and only then tells its size in every version of PIL
        self._orientation = _orientation(image)
        turned = self._orientation in _TURNED
        self.size = (image.width, image.height) if turned else (image.height, image.width)

    def decode(self, at_least: tuple[int, int] = (0, 0)) -> Pixels:
        """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that suffices."""
        image = self._image
        if min(at_least) > 0:
            height, width = at_least if self.size == (image.height, image.width) else at_least[::-1]
            image.draft(image.mode, (width, height))  # nothing but a JPEG does anything here
        image.load()
        of_format = image.format
        if self._orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[self._orientation])  # exif_transpose fails where another tag is broken
        if image.mode not in _EIGHT_BITS:  # grey of 16 or 32 bits
            array = np.asarray(image)
            if image.mode == "I" and of_format in ("PNG", "PPM"):  # 16 bits, which PIL may hold in 32
                array = array.astype(np.uint16)
            return _as_pixels(array[None]).expand(len(self._mode), -1, -1)
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == self._mode else image.convert(self._mode)


def _orientation(image: Image.Image) -> int:
    """As the EXIF data says; 1, upright, where they say nothing or cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # PIL raises anything at broken data, of which the pixels know nothing
        return 1


def _open(file: str | Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def _plain(file: str | Path | bytes, in_chans: int) -> bool:
    """Whether a TIFF is an ordinary picture, which PIL reads as people see it."""
    if in_chans not in _MODES:
        return False
    try:
        with _open(file) as image:
            bits = image.tag_v2.get(258, (8,)) if hasattr(image, "tag_v2") else (8,)  # BitsPerSample
            return image.mode in _EIGHT_BITS and max(bits) <= 8
    except OSError:  # more bands, or more bits, than PIL knows
        return False


def _read_tiff(file: str | Path | bytes, in_chans: int) -> Tensor:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("TIFFs of many bands, or of more than 8 bits, need pip install 'fcmae[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        page, pages = opened.pages.first, [opened.pages.first]
        if in_chans == 3 and page.samplesperpixel == 1 and len(opened.pages) > 1:  # surely not meant to be grey
            raise ChannelsError(f"{len(opened.pages)} pages of one channel each, not data.in_chans=3")
        if in_chans not in _MODES and page.samplesperpixel == 1 and len(opened.pages) == in_chans:
            pages = [each.aspage() for each in opened.pages]  # a page per band, as satellites' often are
        elif in_chans not in _MODES and _pages_are_rows(opened, in_chans):
            _check(len(opened.pages), page.imagelength, page.dtype)
            return _as_pixels(np.moveaxis(opened.series[0].asarray(), 2, 0))
        _check_tiff(pages, in_chans)
        planes = [each.asarray(squeeze=False) for each in pages]  # (P, 1, H, W, S), P or S is 1
    array = np.concatenate([each[:, 0].transpose(0, 3, 1, 2).reshape(-1, *each.shape[2:4]) for each in planes])
    if in_chans in _MODES and page.photometric == _WHITE_IS_ZERO and array.dtype.kind == "u":
        colours = array[: len(array) - len(page.extrasamples)]
        np.subtract(2**page.bitspersample - 1, colours, out=colours)
    pixels, orientation = _as_pixels(array), page.tags.valueof(_ORIENTATION, default=1)
    pixels = (pixels.transpose(1, 2) if orientation in _TURNED else pixels).flip(_FLIPPED.get(orientation, ()))
    return _as_seen(pixels, page.extrasamples, in_chans) if in_chans in _MODES else pixels


def _pages_are_rows(opened: "TiffFile", in_chans: int) -> bool:
    """Whether tifffile was given an array (H, W, C) and nothing else: it then writes a page (W, C) for each row."""
    page = opened.pages.first
    rows = (len(opened.pages), page.imagelength, in_chans)
    return page.samplesperpixel == 1 and page.is_shaped and opened.series[0].shape == rows


def _check_tiff(pages: "Sequence[TiffPage]", in_chans: int) -> None:
    """Refuses, before it is decoded, what has other channels, too many pixels, or no numbers."""
    page = pages[0]
    channels = page.samplesperpixel * len(pages)
    alpha = page.extrasamples in _ALPHA and page.dtype in (np.uint8, np.uint16)  # others have no known white
    colours = channels - alpha if len(page.extrasamples) == alpha else None
    seen = channels == in_chans or (in_chans in _MODES and colours in _MODES)
    alike = all((each.shaped, each.dtype) == (page.shaped, page.dtype) for each in pages)
    if not seen or not alike or page.imagedepth != 1:
        raise ChannelsError(f"{channels} channels (shape of a page: {page.shape}), not data.in_chans={in_chans}")
    _check(page.imagelength, page.imagewidth, page.dtype)


def _as_seen(pixels: Tensor, extra: Sequence[int], in_chans: int) -> Tensor:
    """Grey or RGB, perhaps with alpha -> (in_chans, H, W), on white."""
    if len(pixels) in (2, 4):
        pixels = as_shares(pixels)
        colours, opacity = pixels[:-1], pixels[-1:]
        pixels = (colours if tuple(extra) == _PREMULTIPLIED else colours * opacity) + (1 - opacity)
    if len(pixels) > in_chans:
        return torch.tensordot(torch.tensor(_GREY), as_shares(pixels), 1)[None]
    return pixels.expand(in_chans, -1, -1)


def _read_array(file: str | Path | bytes, in_chans: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> (in_chans, H, W); the header says whether to read the rest."""
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        version = np.lib.format.read_magic(opened)
        later = version > (1, 0)  # the third differs from the second in the names of fields only, and pixels have none
        read = np.lib.format.read_array_header_2_0 if later else np.lib.format.read_array_header_1_0
        found, _, kind = read(opened)
        shape = (*found, 1) if len(found) == 2 else found
        channels = in_chans if in_chans != 3 or in_chans in shape[::2] else 1
        if len(shape) != 3 or channels not in shape[::2] or min(shape) < 1:
            raise ChannelsError(f"an array of shape {found}, not data.in_chans={in_chans} channels")
        axis = 2 if shape[2] == channels else 0
        height, width = shape[:2] if axis == 2 else shape[1:]
        _check(height, width, kind)
        opened.seek(0)
        array = np.load(opened, allow_pickle=False).reshape(shape)
    return _as_pixels(np.moveaxis(array, axis, 0)).expand(in_chans, -1, -1)


def _check(height: int, width: int, kind: "np.dtype[Any] | None") -> None:
    largest = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # where PIL refuses, too
    if height * width > largest:
        raise ValueError(f"{height} x {width} pixels are more than {largest}, which may be an attack")
    if kind is None or kind.newbyteorder("=") not in _CONVERT:
        raise ValueError(f"pixels of type {kind} are no numbers")


def _as_pixels(array: "np.ndarray[Any, Any]") -> Tensor:
    """(C, H, W) of any type -> uint8 or float32."""
    pixels = torch.from_numpy(np.ascontiguousarray(_CONVERT[array.dtype.newbyteorder("=")](array)))
    if pixels.dtype == torch.float32 and not bool(pixels.isfinite().all()):
        raise ValueError("some pixels are no finite numbers")
    return pixels


def _share(bits: int) -> "Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]":
    return lambda array: array.astype(np.float32) / (2**bits - 1)


def _as_they_are(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    with np.errstate(over="ignore"):  # what float32 cannot hold is found to be infinite
        return array.astype(np.float32)


_CONVERT: "dict[np.dtype[Any], Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]]" = {
    np.dtype(bool): lambda array: array.astype(np.uint8) * 255,
    np.dtype(np.uint8): lambda array: array,
    np.dtype(np.uint16): _share(16),
    **{np.dtype(kind): _as_they_are for kind in ("i1", "i2", "i4", "i8", "u4", "u8", "f2", "f4", "f8")},
}
