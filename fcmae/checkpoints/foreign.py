"""What the files of other libraries say of the network beside them, in the words of our own descriptions."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fcmae.checkpoints.descriptions import check_description
from fcmae.errors import UserError

WARP_FROM = 384
"""Pixels per side from which ConvNeXt's pictures are warped to the size, not cropped."""


def describe_foreign(folder: Path) -> dict[str, Any] | None:
    """How images are prepared and what the classes are called, from `config.json` as timm or transformers write it.

    Returns:
        `input` (image_size, in_chans, mean, std), `crop_pct`, `class_names`, `license`, as far as they are known; None
        if there is nothing. A file that is not as expected says nothing.
    """
    config = _read(folder / "config.json")
    if config.get("model_type") == "convnextv2" and config.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{folder}: its config.json has hidden_act={config['hidden_act']!r:.40}, and only gelu is computed"
        )
    said: dict[str, Any] = {}
    with contextlib.suppress(TypeError, ValueError, KeyError, IndexError, AttributeError):
        if isinstance(config.get("pretrained_cfg"), dict):
            said = _timm(config)
        elif config.get("model_type") == "convnextv2":
            said = _transformers(config, _read(folder / "preprocessor_config.json"))
        check_description(said, folder)
        return said or None
    return None


def _timm(config: dict[str, Any]) -> dict[str, Any]:
    about = config["pretrained_cfg"]
    channels, *sides = about["input_size"]
    said = {
        "input": {"image_size": sides, "in_chans": channels, "mean": list(about["mean"]), "std": list(about["std"])},
        "crop_pct": "warp" if about.get("crop_mode") == "squash" else float(about["crop_pct"]),
        "class_names": [str(name) for name in config.get("label_names") or about.get("label_names") or []],
        "license": about.get("license"),
    }
    return {key: value for key, value in said.items() if value}


def _transformers(config: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if processor:
        sides, crop_pct = _sides(processor)
        mean, std = list(processor["image_mean"]), list(processor["image_std"])
        said = {"input": {"image_size": sides, "in_chans": len(mean), "mean": mean, "std": std}, "crop_pct": crop_pct}
    elif config.get("image_size"):
        said = {"input": {"image_size": config["image_size"]}}
    if "ConvNextV2ForImageClassification" in config.get("architectures", []):
        names = {int(number): str(name) for number, name in config["id2label"].items()}
        said["class_names"] = [names[number] for number in range(len(names))]
        said["multi_label"] = config.get("problem_type") == "multi_label_classification"
    return said


def _sides(processor: dict[str, Any]) -> tuple[list[int], float | str]:
    """Image size and share of the crop, as the image processors of ConvNeXt, CLIP and ViT mean theirs."""
    size = processor["size"]
    size = {"shortest_edge": size} if isinstance(size, int) else size
    if processor.get("do_center_crop") and (crop := processor.get("crop_size")):
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        resized = size.get("shortest_edge") or size["height"]
        return [crop["height"], crop["width"]], crop["height"] / resized
    side = size.get("shortest_edge")
    if not side:
        return [size["height"], size["width"]], "warp"
    # That of ConvNeXt warps from 384 px on and crops below, whatever the share says.
    return [side, side], float(processor.get("crop_pct") or 0.875) if side < WARP_FROM else "warp"


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):  # not there, or no JSON
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
