"""The model card of an export: README.md in the form of the Hugging Face hub.

Nothing in it is taken to be harmless: names of classes, runs and files come from others, and stay text.
"""

import contextlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from fcmae.checkpoints.lineage import DROPPED, Lineage
from fcmae.checkpoints.names import Size
from fcmae.checkpoints.weights import is_classifier
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import opened
from fcmae.inference.trained import Trained

_ON_THE_HUB = {"hf": "transformers", "timm": "timm", "backbone": "transformers", "onnx": "onnx"}
"""What the hub calls the libraries that it knows."""

_FROM_A_FOLDER = ("onnx", "torch", "official")
"""Whose libraries know no names of the hub."""

_MOST_CLASSES = 20
_MOST_CHARACTERS = 80
_REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells of the export itself.

    Attributes:
        to: the kind of export.
        name: under which it is loaded.
        library: that has loaded it, with its version.
        difference: between its numbers and ours, in words.
        license: under which it is given away; None if that is not known.
        lineage: what the weights come from.
        exported: what the export is called.
    """

    to: str
    name: str
    library: str
    difference: str
    license: str | None
    lineage: Lineage
    exported: str


def model_card(trained: Trained, conversion: Conversion, facts: Facts, about: dict[str, Any]) -> str:
    """The card: what it is, how to load it, how it was trained, results, licence.

    Args:
        trained: what was exported.
        conversion: by which.
        facts: of the export.
        about: what the export says of itself, see `fcmae.conversion.exporting.description`.
    """
    said = about if trained.source.ours else {}
    sections = [
        f"---\n{_front_matter(trained, facts)}\n---",
        f"# {_text(said.get('run_name') or facts.exported)}",
        _what_it_is(trained, said),
        _loading(trained, conversion, facts),
        _input(trained),
        _training(said),
        _results(trained, said),
        f"## Checked\n\nThe weights are those of {_text(trained.source.source)}. When they were exported, "
        f"{facts.library} loaded them and computed what fcmae computes: {facts.difference}.",
        _licence(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _text(value: object) -> str:
    """Anything as Markdown text: one line of no more than 80 characters that means nothing but itself."""
    spaced = " ".join(str(value).split())
    plain = "".join(character for character in spaced if unicodedata.category(character)[0] != "C").strip()
    if len(plain) > _MOST_CHARACTERS:
        plain = plain[: _MOST_CHARACTERS - 3] + "..."
    escaped = re.sub(r"[\\`*\[\]<>|&~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)
    return re.sub(r"://|www\.", lambda link: f"{link[0][:-1]}\\{link[0][-1]}", escaped, flags=re.IGNORECASE) or '""'


def _front_matter(trained: Trained, facts: Facts) -> str:
    plain = facts.license and re.fullmatch(r"[\w.+-]+", facts.license, re.ASCII)
    data = ModelCardData(
        license=facts.license if plain else None,
        library_name=_ON_THE_HUB.get(facts.to),
        pipeline_tag="image-classification" if trained.class_names else "image-feature-extraction",
        tags=["convnextv2", "fcmae", "masked-autoencoder", "self-supervised-learning"],
        base_model=_on_the_hub(facts.lineage),
    )
    return data.to_yaml()


def _on_the_hub(lineage: Lineage) -> list[str] | None:
    """The repositories of the hub among what the weights come from, each once."""
    sources = (re.fullmatch(f"hf-hub:({_REPOSITORY})(@.*)?", str(entry["source"]), re.ASCII) for entry in lineage)
    return list(dict.fromkeys(source[1] for source in sources if source)) or None


def _what_it_is(trained: Trained, said: dict[str, Any]) -> str:
    size = Size.of(trained.net.state_dict())
    classes = trained.class_names
    counted = (value.numel() for name, value in trained.net.named_parameters() if classes or "head.fc" not in name)
    parameters = sum(counted) / 1e6
    model = f"ConvNeXt V2 {size.name if size.name != 'custom' else str(size).removeprefix('custom ')}"
    if not classes:
        what = f"The encoder of a {model}, {parameters:.1f} M parameters"
        if said and is_classifier(said):
            return f"{what}, fine-tuned for classification; the classifier is left out."
        told = "pre-trained without labels as a fully convolutional masked autoencoder (FCMAE)"
        return f"{what}, {told}." if said else f"{what}, without classifier."
    kind = "any number of" if trained.multi_label else "one of"
    listed = ", ".join(map(_text, classes[:_MOST_CLASSES])) + (", ..." if len(classes) > _MOST_CLASSES else "")
    return f"A {model}, {parameters:.1f} M parameters. It tells {kind} {len(classes)} classes: {listed}."


def _loading(trained: Trained, conversion: Conversion, facts: Facts) -> str:
    """Lines to copy: nothing but letters, digits, blanks and `.-/` comes into them from a name."""
    name, download = facts.name, ""
    if not re.fullmatch(r"[\w./ -]+", name):
        name = "./NAME-OF-THE-FOLDER"
    elif facts.to in _FROM_A_FOLDER and re.fullmatch(_REPOSITORY, name):
        folder = name.partition("/")[2]
        download = f"```shell\nhf download {name} --local-dir {folder}\n```\n\n"
        name = f"./{folder}"
    lines = conversion.usage(name, trained)
    return f"## Load it\n\n{download}```python\n{lines}\n```{_of_16_bits(lines, trained, facts)}"


def _of_16_bits(lines: str, trained: Trained, facts: Facts) -> str:
    """What the lines are to say for greys of 16 bits, as the network may well have been trained on: no file tells."""
    opens = opened(trained.preparation)
    if trained.preparation.in_chans != 1 or opens is None or opens not in lines:
        return ""
    to_scale = "/ 65535" if facts.to == "timm" else "* (255 / 65535)"  # timm's transform divides bytes alone
    instead = f'Image.fromarray(np.asarray(Image.open("image.png"), np.float32) {to_scale})'
    return (
        f"\n\nFiles of 16 bits are clipped to 255 by `{opens}`: for them write `{instead}` in its place, after "
        "`import numpy as np`."
    )


def _input(trained: Trained) -> str:
    preparation = trained.preparation
    height, width = preparation.image_size
    return (
        f"Input: {preparation.in_chans} channels, {height}x{width} px; pixels in [0, 1] less the mean "
        f"{_numbers(preparation.mean)}, divided by the deviation {_numbers(preparation.std)}."
    )


def _training(said: dict[str, Any]) -> str:
    if not said:
        return ""
    recipe, steps = _part(said, "recipe"), _part(said, "steps")
    versions = {"fcmae": said.get("fcmae"), **_part(said, "versions")}
    rows = {
        "images": steps.get("data"),
        "epochs": recipe.get("epochs"),
        "images per step": steps.get("effective_batch"),
        "seed": recipe.get("seed"),
        "step": said.get("step"),
        "weights": said.get("weights"),
    }
    told = {name: _text(value) for name, value in rows.items() if value not in (None, "")}
    told["software"] = ", ".join(_text(f"{name} {number}") for name, number in versions.items())
    table = "\n".join(f"| {name} | {value} |" for name, value in told.items())
    text = f"## How it was trained\n\nWith fcmae.\n\n| | |\n|---|---|\n{table}"
    if recipe:
        options = yaml.safe_dump(recipe, sort_keys=False).rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", options)), default=0))
        text += f"\n\n<details><summary>all options</summary>\n\n{fence}yaml\n{options}\n{fence}\n\n</details>"
    return text


def _results(trained: Trained, said: dict[str, Any]) -> str:
    """Those of the run that are of this very network: of the best checkpoint if it is that, else at the run's end."""
    before = _part(_part(said, "recipe"), "data").get("image_size")
    if before is not None and _sides(before) != _sides(_part(said, "input").get("image_size")):
        return f"## Results\n\nThe run's results were at another image size, {_text(before)} px: none are given here."
    best, average = _part(said, "best"), said.get("weights") == "moving average"
    metric, value = best.get("metric"), best.get("value")
    if _is_result(metric, value) and str(metric).startswith("val_ema_") == average:
        rows = {f"{metric}, at step {_text(best.get('step'))}, by which this checkpoint was chosen": value}
    else:
        pretraining = bool(said) and not is_classifier(said)
        rows = {
            name: value
            for name, value in _summary(trained.source.file, said.get("step")).items()
            if _is_result(name, value)
            and (name.startswith("val_ema_") == average or (pretraining and name.startswith("val_loss")))
        }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    how = (
        ", with the classifier that is left out here"
        if said and is_classifier(said) and not trained.class_names
        else ""
    )
    return f"## Results\n\nOn the run's held-out images{how}.\n\n| | |\n|---|---|\n{table}" if rows else ""


def _summary(file: Path, step: Any) -> dict[str, Any]:
    """What the run of a checkpoint noted at its end, if that is the step of the checkpoint; else nothing."""
    if file.parent.name not in ("checkpoints", "exported"):
        return {}
    with contextlib.suppress(OSError, ValueError, RecursionError):  # not there, or damaged
        content = json.loads((file.resolve().parent.parent / "summary.json").read_text(encoding="utf-8"))
        if isinstance(content, dict) and type(content.get("steps")) is int and content["steps"] == step:
            return content
    return {}


def _is_result(name: Any, value: Any) -> bool:
    known = isinstance(name, str) and re.fullmatch(r"val_[a-z0-9_]{1,60}", name)
    return bool(known) and type(value) in (int, float) and abs(value) < 1e30  # and so neither NaN nor infinite


def _part(said: dict[str, Any], name: str) -> dict[str, Any]:
    """A dictionary within another; empty if it is not there, or is something else."""
    part = said.get(name)
    return part if isinstance(part, dict) else {}


def _sides(size: Any) -> list[Any]:
    return list(size) if isinstance(size, list | tuple) else [size, size]


def _licence(facts: Facts) -> str:
    told = f"The licence of this export: {_text(facts.license)}." if facts.license else "No licence is stated for it."
    rows = [
        f"| {_text(entry['source'])} | {_text(entry.get('license') or 'not known')}"
        f"{' (dropped)' * bool(entry.get(DROPPED))} | `{re.sub('[^0-9a-f]', '', entry['sha256'])[:16]}` |"
        for entry in facts.lineage
    ]
    text = f"## Licence\n\n{told}\n\nThe weights come from these files, the first one first:\n\n"
    text += "| file | licence | SHA-256 begins |\n|---|---|---|\n" + "\n".join(rows)
    if any(entry.get(DROPPED) for entry in facts.lineage):
        text += "\n\nWhoever exported them has declared that the licences marked as dropped do not bind them."
    return text


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
