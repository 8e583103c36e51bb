"""Picture files to pixels: JPEG, PNG, WebP, TIFF, BMP, PPM and NumPy arrays, of any number of channels."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fcmae.data.picture import Decoded, Picture, Pixels

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
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
        return Decoded(_array(_load_array(file), in_chans))
    if extension in (".tif", ".tiff") and not _plain(file, in_chans):
        return Decoded(_array(_read_tiff(file), in_chans))
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
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        self.size = (image.width, image.height) if turned else (image.height, image.width)

    def decode(self, at_least: tuple[int, int] = (0, 0)) -> Pixels:
        """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that suffices."""
        image = self._image
        if min(at_least) > 0:
            height, width = at_least if self.size == (image.height, image.width) else at_least[::-1]
            image.draft(image.mode, (width, height))  # nothing but a JPEG does anything here
        image = ImageOps.exif_transpose(image)
        if image.mode not in _EIGHT_BITS:  # grey of 16 or 32 bits
            array = np.asarray(image)
            if self._image.format == "PNG":  # never more than 16 bits, though older PILs hold them in 32
                array = array.astype(np.uint16)
            return _array(array, 3 if self._mode == "RGB" else 1)
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(self._mode)


def _open(file: str | Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def _load_array(file: str | Path | bytes) -> "np.ndarray[Any, Any]":
    array: np.ndarray[Any, Any] = np.load(io.BytesIO(file) if isinstance(file, bytes) else file, allow_pickle=False)
    return array


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


def _read_tiff(file: str | Path | bytes) -> "np.ndarray[Any, Any]":
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("TIFFs of many bands, or of more than 8 bits, need pip install 'fcmae[tiff]'") from error
    with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        series = opened.series[0]
        largest = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # where PIL refuses, too
        if math.prod(sorted(series.shape)[-2:]) > largest:
            raise ValueError(f"an image of shape {series.shape} has more than {largest} pixels, which may be an attack")
        array: np.ndarray[Any, Any] = series.asarray()
    return array


def _array(array: "np.ndarray[Any, Any]", in_chans: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) of any type -> (in_chans, H, W) uint8 or float32."""
    found = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and in_chans not in (array.shape[0], array.shape[2]) and 1 in (array.shape[0], array.shape[2]):
        array = array if array.shape[0] == 1 else array.transpose(2, 0, 1)  # grey
    elif array.ndim == 3 and array.shape[2] == in_chans:
        array = array.transpose(2, 0, 1)
    if array.ndim == 3 and len(array) == 1 and in_chans == 3:
        array = array.repeat(3, axis=0)
    if array.ndim != 3 or len(array) != in_chans or 0 in array.shape:
        raise ChannelsError(f"an array of shape {found}, not data.in_chans={in_chans} channels")
    convert = _CONVERT.get(array.dtype.newbyteorder("="))
    if convert is None:
        raise ValueError(f"pixels of type {array.dtype} are no numbers")
    pixels = torch.from_numpy(np.ascontiguousarray(convert(array)))
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
