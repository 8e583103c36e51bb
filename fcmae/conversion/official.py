"""The authors' checkpoints: their names and shapes of a dense ConvNeXt V2."""

from pathlib import Path
from typing import ClassVar

import timm
import torch
from timm.models import load_checkpoint
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from fcmae.checkpoints.names import OFFICIAL_TO_TIMM, has_grn, renamed, to_official
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import imports, picture_lines
from fcmae.conversion.timm import architecture
from fcmae.errors import UserError
from fcmae.files import atomic_writer
from fcmae.inference.trained import Trained


class Official(Conversion):
    """`model.pth` for the authors' code and whatever reads its files, such as timm.

    It has the names and shapes of their dense model; a classifier is as in their releases of fine-tuned models, and
    `--resume` of their `main_finetune.py` takes it. The final norm of a pre-trained encoder is there as ones and zeros.

    That script's `--finetune` expects GRN as pre-training has it, (1, C), and gives it two axes more as it loads (their
    `remap_checkpoint_keys`); of (1, 1, 1, C) it makes what fits nowhere, and goes on without. So for an encoder there
    is `finetune.pth` too.
    """

    library: ClassVar[str] = "timm"  # which reads these files; the authors' code cannot be installed

    def check(self, trained: Trained) -> None:
        """Their ConvNeXt V2 always has GRN.

        Raises:
            UserError: the network has none.
        """
        if not has_grn(trained.net.state_dict()):
            raise UserError(
                f"{trained.source.file} has no GRN layers, which the authors' ConvNeXt V2 always has: use to=timm"
            )

    def write(self, trained: Trained, folder: Path) -> None:
        """`model.pth`: the state dict under `model`, plain tensors; of an encoder `finetune.pth` likewise."""
        weights = {name: value.contiguous() for name, value in to_official(trained.net.state_dict()).items()}
        _save(weights, folder / "model.pth")
        if not trained.class_names:
            of_pretraining = {name: value.view(1, -1) if ".grn." in name else value for name, value in weights.items()}
            _save(of_pretraining, folder / "finetune.pth")

    @torch.inference_mode()
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """Of timm's network, with the file read by timm's reader of the authors' files, strictly.

        Raises:
            UserError: `finetune.pth` has other weights.
        """
        file, other = folder / "model.pth", folder / "finetune.pth"
        weights = renamed(torch.load(file, weights_only=True, mmap=True)["model"], OFFICIAL_TO_TIMM)
        if other.is_file():
            same = renamed(torch.load(other, weights_only=True, mmap=True)["model"], OFFICIAL_TO_TIMM)
            if same.keys() != weights.keys() or not all(torch.equal(same[key], weights[key]) for key in weights):
                raise UserError(f"{other.name} did not come out as {file.name}: nothing is left of the export")
        name, options = architecture(weights)
        net = timm.create_model(name, num_classes=len(weights.get("head.fc.weight", ())), **options).eval()
        load_checkpoint(net, str(file), filter_fn=checkpoint_filter_fn, weights_only=True)
        return [net(images) if net.num_classes else net.forward_features(images)]

    def usage(self, name: str, trained: Trained) -> str:
        """With timm, which reads the authors' files; their own scripts take the file as an option, see above."""
        architecture_name, options = architecture(trained.net.state_dict())
        given = "".join(f", {key}={value}" for key, value in options.items())
        call = "logits = net" if trained.class_names else "features = net.forward_features"
        return "\n".join(
            [
                *imports(trained.preparation, "timm", "torch"),
                "from timm.models.convnext import checkpoint_filter_fn",
                "",
                f'net = timm.create_model("{architecture_name}", num_classes={trained.net.num_classes}{given}).eval()',
                f'timm.models.load_checkpoint(net, "{name}/model.pth", filter_fn=checkpoint_filter_fn)',
                *picture_lines(trained.preparation),
                "with torch.inference_mode():",
                f"    {call}(torch.from_numpy(images))",
            ]
        )


def _save(weights: dict[str, Tensor], path: Path) -> None:
    with atomic_writer(path) as file:
        torch.save({"model": weights}, file)
