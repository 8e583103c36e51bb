"""The directions out, by name."""

from importlib import import_module

from fcmae.conversion.conversion import Conversion
from fcmae.errors import UserError

FORMATS = {
    "timm": "fcmae.conversion.timm.Timm",
    "hf": "fcmae.conversion.hf.HuggingFace",
    "onnx": "fcmae.conversion.onnx.Onnx",
    "torch": "fcmae.conversion.program.Program",
    "official": "fcmae.conversion.official.Official",
    "backbone": "fcmae.conversion.backbone.Backbone",
}


def get_conversion(to: str) -> Conversion:
    """The conversion of this name.

    Raises:
        UserError: there is none.
    """
    if to not in FORMATS:
        raise UserError(f"to={to!r} is unknown: use {', '.join(FORMATS)}")
    module, _, name = FORMATS[to].rpartition(".")
    conversion: Conversion = getattr(import_module(module), name)()
    return conversion
