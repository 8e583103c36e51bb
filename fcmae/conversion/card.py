"""The model card of an export: README.md in the form of the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from fcmae.checkpoints.lineage import DROPPED, Lineage
from fcmae.checkpoints.names import Size
from fcmae.checkpoints.weights import is_classifier
from fcmae.conversion.conversion import Conversion
from fcmae.inference.trained import Trained

_ON_THE_HUB = {"hf": "transformers", "timm": "timm", "backbone": "transformers", "onnx": "onnx"}
"""What the hub calls the libraries that it knows."""

_MOST_CLASSES = 20


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


def model_card(trained: Trained, conversion: Conversion, facts: Facts) -> str:
    """The card: what it is, how to load it, how it was trained, results, licence."""
    said = trained.source.description if trained.source.ours else None
    sections = [
        f"---\n{_front_matter(trained, facts)}\n---",
        f"# {said.get('run_name') or facts.exported if said else facts.exported}",
        _what_it_is(trained, said),
        f"## Load it\n\n```python\n{conversion.usage(facts.name, trained)}\n```",
        _input(trained),
        _training(said),
        _results(trained, said),
        f"## Checked\n\nThe weights are those of `{trained.source.source}`. When they were exported, {facts.library} "
        f"loaded them and computed what fcmae computes: {facts.difference}.",
        _licence(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(trained: Trained, facts: Facts) -> str:
    data = ModelCardData(
        license=facts.license,
        library_name=_ON_THE_HUB.get(facts.to),
        pipeline_tag="image-classification" if trained.class_names else "image-feature-extraction",
        tags=["convnextv2", "fcmae", "masked-autoencoder", "self-supervised-learning"],
        base_model=_on_the_hub(facts.lineage),
    )
    return data.to_yaml()


def _on_the_hub(lineage: Lineage) -> list[str] | None:
    """The repositories of the hub among what the weights come from."""
    names = [str(entry["source"]).removeprefix("hf-hub:").partition("@")[0] for entry in lineage]
    found = [name for name, entry in zip(names, lineage, strict=True) if str(entry["source"]).startswith("hf-hub:")]
    return found or None


def _what_it_is(trained: Trained, said: dict[str, Any] | None) -> str:
    size = Size.of(trained.net.state_dict())
    classes = trained.class_names
    counted = (value.numel() for name, value in trained.net.named_parameters() if classes or "head.fc" not in name)
    parameters = sum(counted) / 1e6
    model = f"ConvNeXt V2 {size.name}" if size.name != "custom" else f"ConvNeXt V2 of one's own size ({size})"
    if not classes:
        what = f"The encoder of a {model}, {parameters:.1f} M parameters"
        if said and is_classifier(said):
            return f"{what}, fine-tuned for classification; the classifier is left out."
        told = "pre-trained without labels as a fully convolutional masked autoencoder (FCMAE)"
        return f"{what}, {told}." if said else f"{what}, without classifier."
    kind = "any number of" if trained.multi_label else "one of"
    listed = ", ".join(classes[:_MOST_CLASSES]) + (", ..." if len(classes) > _MOST_CLASSES else "")
    return f"A {model}, {parameters:.1f} M parameters. It tells {kind} {len(classes)} classes: {listed}."


def _input(trained: Trained) -> str:
    preparation = trained.preparation
    height, width = preparation.image_size
    return (
        f"Input: {preparation.in_chans} channels, {height}x{width} px; pixels in [0, 1] less the mean "
        f"{_numbers(preparation.mean)}, divided by the deviation {_numbers(preparation.std)}."
    )


def _training(said: dict[str, Any] | None) -> str:
    if said is None:
        return ""
    recipe: dict[str, Any] = said.get("recipe", {})
    steps: dict[str, Any] = said.get("steps", {})
    rows = {
        "images": steps.get("data"),
        "epochs": recipe.get("epochs"),
        "images per step": steps.get("effective_batch"),
        "seed": recipe.get("seed"),
        "weights": said.get("weights"),
        "software": ", ".join(f"{name} {number}" for name, number in _versions(said).items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))
    text = f"## How it was trained\n\nWith fcmae.\n\n| | |\n|---|---|\n{table}"
    if recipe:
        options = yaml.safe_dump(recipe, sort_keys=False).rstrip()
        text += f"\n\n<details><summary>all options</summary>\n\n```yaml\n{options}\n```\n\n</details>"
    return text


def _versions(said: dict[str, Any]) -> dict[str, str]:
    return {"fcmae": said["fcmae"], **said.get("versions", {})}


def _results(trained: Trained, said: dict[str, Any] | None) -> str:
    """Those of the run that the checkpoint is of: at its end, and of the best checkpoint if this is that."""
    lines = []
    best: dict[str, Any] = (said or {}).get("best", {})
    if best:
        lines.append(
            f"| {best['metric']}, at step {best['step']}, by which this checkpoint was chosen | {best['value']} |"
        )
    else:
        lines += [f"| {name} | {value} |" for name, value in _summary(trained.source.file).items()]
    return "## Results\n\nOn the run's held-out images.\n\n| | |\n|---|---|\n" + "\n".join(lines) if lines else ""


def _summary(file: Path) -> dict[str, Any]:
    """What the run of a checkpoint noted at its end."""
    summary = file.resolve().parent.parent / "summary.json"
    if file.parent.name not in ("checkpoints", "exported") or not summary.is_file():
        return {}
    content = json.loads(summary.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _licence(facts: Facts) -> str:
    told = f"`{facts.license}`" if facts.license else "No licence is stated for these weights."
    if not facts.lineage[:-1] and not facts.lineage[-1].get("license"):
        return f"## Licence\n\n{told}"
    rows = [
        f"| {entry['source']} | {entry.get('license') or 'not known'}{' (dropped)' * bool(entry.get(DROPPED))} "
        f"| `{entry['sha256'][:16]}` |"
        for entry in facts.lineage
    ]
    text = f"## Licence\n\n{told}\n\nThe weights come from these files, the first one first:\n\n"
    text += "| file | licence | SHA-256 begins |\n|---|---|---|\n" + "\n".join(rows)
    if any(entry.get(DROPPED) for entry in facts.lineage):
        text += "\n\nWhoever exported them has declared that the licences marked as dropped do not bind them."
    return text


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
