"""fcmae: masked-autoencoder pre-training of ConvNeXt V2 (FCMAE) in PyTorch.

>>> import fcmae
>>> model = fcmae.create_model("tiny")
>>> loss, pred, mask = model(images)  # images (B, 3, 224, 224)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcmae.checkpoints.load import load as load
    from fcmae.errors import UserError as UserError
    from fcmae.inference.trained import load_trained as load_trained
    from fcmae.masking import Mask as Mask
    from fcmae.masking import RandomMask as RandomMask
    from fcmae.models.create import create_model as create_model
    from fcmae.models.fcmae import FCMAE as FCMAE
    from fcmae.models.fcmae import Output as Output
    from fcmae.models.targets import Pixels as Pixels

__version__ = "0.1.0"

_HOME = {
    "FCMAE": "fcmae.models.fcmae",
    "Mask": "fcmae.masking",
    "Output": "fcmae.models.fcmae",
    "Pixels": "fcmae.models.targets",
    "RandomMask": "fcmae.masking",
    "UserError": "fcmae.errors",
    "create_model": "fcmae.models.create",
    "load": "fcmae.checkpoints.load",
    "load_trained": "fcmae.inference.trained",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Importing fcmae stays instant: torch and timm are loaded when something of theirs is first asked for.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fcmae' has no attribute {name!r}")
