"""Hugging Face transformers: its ConvNextV2 models, and an image processor that prepares pictures as ours are."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fcmae.checkpoints.names import Size, has_grn, to_hf
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import imports, opened, picture_lines
from fcmae.data.classification_transforms import WARP_FROM
from fcmae.data.preparation import Preparation
from fcmae.errors import UserError
from fcmae.inference.trained import Trained


class HuggingFace(Conversion):
    """`model.safetensors`, `config.json` and `preprocessor_config.json`, all three written by transformers itself.

    A network with a classifier becomes a `ConvNextV2ForImageClassification`, one without a `ConvNextV2Model`.
    """

    library: ClassVar[str] = "transformers"

    def check(self, trained: Trained) -> None:
        """transformers' ConvNextV2 always has GRN.

        Raises:
            UserError: the network has none, or transformers is not installed.
        """
        check_transformers("hf")
        if not has_grn(trained.net.state_dict()):
            raise UserError(
                f"{trained.source.file} has no GRN layers, transformers' ConvNextV2 cannot do without: use to=timm"
            )

    def write(self, trained: Trained, folder: Path) -> None:
        """The model, then the image processor."""
        import transformers

        weights = to_hf(trained.net.state_dict())
        kind: Any = transformers.ConvNextV2ForImageClassification
        if not trained.class_names:
            kind = transformers.ConvNextV2Model
            weights = {name.removeprefix("convnextv2."): value for name, value in weights.items()}
        with torch.device("meta"):  # initialises nothing: every weight is given
            model = kind(_config(trained))
        model.load_state_dict(weights, assign=True)
        with without_bars():
            model.save_pretrained(folder)
        if _has_processor(trained.preparation):  # without one, a pipeline says so
            _processor(trained.preparation).save_pretrained(folder)

    @torch.inference_mode()
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """Of the model that transformers' Auto classes make of the folder."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        with without_bars():
            if config.architectures == ["ConvNextV2ForImageClassification"]:
                model = transformers.AutoModelForImageClassification.from_pretrained(folder)
                return [model(images).logits]
            outputs = transformers.AutoModel.from_pretrained(folder)(images)
            return [outputs.last_hidden_state, outputs.pooler_output]

    @torch.inference_mode()
    def expected(self, trained: Trained, images: Tensor) -> list[Tensor]:
        """Logits; without a classifier the last feature map, and its mean behind the final norm."""
        if trained.class_names:
            return super().expected(trained, images)
        features = trained.net.forward_features(images)
        return [features, trained.net.forward_head(features, pre_logits=True)]

    def usage(self, name: str, trained: Trained) -> str:
        """A pipeline where it can read the pictures, else the model and what there is to prepare them."""
        preparation = trained.preparation
        image, classes = opened(preparation), bool(trained.class_names)
        processed = image is not None and _has_processor(preparation)
        if classes and processed and preparation.in_chans == 3:
            return (
                "from transformers import pipeline\n\n"
                f'classifier = pipeline("image-classification", model="{name}")\n'
                'print(classifier("image.jpg"))'
            )
        kind = "AutoModelForImageClassification" if classes else "AutoModel"
        lines = [f"from transformers import {'AutoImageProcessor, ' * processed}{kind}", ""]
        if processed:
            lines = ["import torch", "from PIL import Image", *lines]
            lines.append(f'processor = AutoImageProcessor.from_pretrained("{name}")')
            lines.append(f'images = processor({image}, return_tensors="pt").pixel_values')
        else:
            lines = [*imports(preparation, "torch"), *lines, *picture_lines(preparation)]
            lines.append("images = torch.from_numpy(images)")
        lines += [f'model = {kind}.from_pretrained("{name}")', "with torch.inference_mode():"]
        lines.append(f"    outputs = model(images).{'logits' if classes else 'last_hidden_state'}")
        if classes:
            lines.append("print(model.config.id2label[int(outputs.argmax())])")
        return "\n".join(lines)


def _config(trained: Trained) -> Any:
    """A `ConvNextV2Config` that leaves nothing to defaults which are not ours."""
    import transformers

    size, (height, width) = Size.of(trained.net.state_dict()), trained.preparation.image_size
    named: dict[str, Any] = {}
    if trained.class_names:
        named["id2label"] = dict(enumerate(trained.class_names))
        named["label2id"] = {name: index for index, name in named["id2label"].items()}
    if trained.multi_label:  # one label per image goes without saying: said, transformers 4.46 takes a sigmoid
        named["problem_type"] = "multi_label_classification"
    return transformers.ConvNextV2Config(
        num_channels=trained.preparation.in_chans,
        depths=list(size.depths),
        hidden_sizes=list(size.dims),
        image_size=height if height == width else [height, width],
        layer_norm_eps=1e-6,  # of the final norm alone; its default, 1e-12, is not that of the authors and timm
        **named,
    )


def _has_processor(preparation: Preparation) -> bool:
    """Whether transformers can prepare such pictures: none of its processors crops a picture to an oblong that fits."""
    height, width = preparation.image_size
    return height == width or preparation.crop_share is None


def _processor(preparation: Preparation) -> Any:
    """The image processor of transformers that does what `evaluation_transform` does, up to rounding.

    That of ConvNeXt always crops below 384 px and always warps from there; for all else CLIP's, which does as told.
    """
    import transformers

    (height, width), share = preparation.image_size, preparation.crop_share
    options: dict[str, Any] = {
        "image_mean": list(preparation.mean),
        "image_std": list(preparation.std),
        "resample": 3,  # bicubic, as PIL counts
        "do_convert_rgb": preparation.in_chans == 3,
    }
    if height == width and (share is None) == (height >= WARP_FROM):
        crop_pct = {} if share is None else {"crop_pct": share}
        return transformers.ConvNextImageProcessor(size={"shortest_edge": height}, **crop_pct, **options)
    size = {"height": height, "width": width}
    if share is None:
        return transformers.CLIPImageProcessor(size=size, do_center_crop=False, **options)
    larger = {"shortest_edge": int(height / share)}
    return transformers.CLIPImageProcessor(size=larger, do_center_crop=True, crop_size=size, **options)


def check_transformers(to: str) -> None:
    """Refuses to go on without transformers.

    Raises:
        UserError: says what to install.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f'to={to} needs transformers, which is not installed: pip install "fcmae[export]"')


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows progress bars for files of any size."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
