"""`python -m fcmae.evaluate checkpoint=outputs/finetune/x data.path=DIR`: how good is it?"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fcmae.command_line.config_check import check_choice, check_kinds, check_whole
from fcmae.command_line.launch import build, run
from fcmae.command_line.result_folder import check_same, data_options, result_folder, what_is_evaluated
from fcmae.command_line.run_inference import compute_options, image_sides, progress_bar, stage_numbers
from fcmae.data.folder import Folder
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.sharded import ShardedDataModule
from fcmae.data.transforms import Crop
from fcmae.errors import UserError
from fcmae.evaluation.classification import ClassificationMetrics
from fcmae.evaluation.classification_report import ClassificationReport
from fcmae.evaluation.knn import KNN, accuracy
from fcmae.evaluation.linear_probe import linear_probe
from fcmae.files import write_text
from fcmae.inference.batches import Compute, outputs
from fcmae.inference.features import FeatureCache, Features, feature_function, labelled_features, weights_digest
from fcmae.inference.ground_truth import indices_of, labels_for
from fcmae.inference.trained import Trained, load_trained


def evaluate(config: DictConfig) -> None:
    """Says how good a classifier is, or a frozen encoder by a probe; writes numbers, tables and a picture.

    Raises:
        UserError: something that the user can mend.
    """
    check_choice(config, "split", ("val", "train", "all"))
    check_choice(config, "probe", (None, "knn", "linear"))
    check_choice(config, "classes", ("by_name", "by_order"))
    check_whole(config, "seed", least=0, most=2**32 - 1)
    compute = compute_options(config)
    config.knn.k = [config.knn.k] if isinstance(config.knn.k, int) else config.knn.k
    check_kinds(config.knn, KNN, ("k", "temperature"), "knn.")
    check_kinds(config.linear, linear_probe, ("penalties", "max_iterations"), "linear.")
    stages = stage_numbers(config.stages)
    out = result_folder(config)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={config.out} is a file: name a folder")
    if (out / "checkpoints").is_dir():
        raise UserError(f"out={config.out} is the folder of a run: name another")
    trained = load_trained(config.checkpoint, ema=config.ema, image_size=image_sides(config.image_size))
    data = _data(config, trained)
    what = what_is_evaluated(config, trained)
    if config.out is None:
        check_same(out, what)
    compute.place(trained.net)
    broken, found = Broken(), dict[str, Any]()
    if config.probe is None:
        report = _classify(config, trained, data, compute, broken)
    else:
        report, found = _probe(config, trained, data, stages, compute, broken)
    about = {**what, "skipped": [name for name, _ in broken], **found}
    without_picture = report.save(out)
    write_text(out / "about.json", json.dumps(about, indent=2) + "\n")
    console = Console(highlight=False, soft_wrap=True)
    for name, reason in broken:
        console.print(f"skipped {name}: {reason}", markup=False)
    for line in [
        f"{about['weights']}: {about['checkpoint']}",
        *report.lines(),
        *_told(found),
        without_picture or "",
        f"written: {out}",
    ]:
        console.print(line, markup=False) if line else None


Broken = list[tuple[str, str]]
"""(sample id, reason) of images that could not be read."""


def _data(config: DictConfig, trained: Trained) -> LabelledDataModule:
    """The labelled images, read as the network wants them, and with as many labels each as its classifier knows."""
    given = trained.preparation
    typed = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    several = trained.multi_label and config.probe is None  # a probe learns whatever labels there are
    if several and "multi_label" in config.data and "data.multi_label" not in typed:
        config.data.multi_label = True
    data = build(
        config.data,
        augment=Crop(crop_scale=[1.0, 1.0], flip=False),
        image_size=list(given.image_size),
        in_chans=given.in_chans,
        mean=list(given.mean),
        std=list(given.std),
    )
    if not isinstance(data, LabelledDataModule):
        raise UserError(
            "data=folder has no labels: use data=imagefolder (a folder per class), data=table (a CSV file), "
            "data=webdataset or data=hf"
        )
    return data


def _classify(
    config: DictConfig, trained: Trained, data: LabelledDataModule, compute: Compute, broken: Broken
) -> ClassificationReport:
    """The network's own classifier on one part of the images."""
    if not trained.class_names:
        raise UserError(f"{trained.source.file} holds no classifier: add probe=knn or probe=linear, or fine-tune it")
    indices = indices_of(config.split, data, trained)
    metrics = ClassificationMetrics(len(trained.class_names), multi_label=trained.multi_label)
    metrics.to(compute.torch_device)
    labels = labels_for(trained, data, by_order=config.classes == "by_order")
    with progress_bar() as bar:
        task = bar.add_task(config.split, total=len(indices))
        for output in outputs(
            data.source, indices, trained.preparation, trained.net, compute,
            labels=labels, broken=broken, advance=lambda images: bar.advance(task, images),
        ):  # fmt: skip
            assert output.labels is not None
            metrics.update(output.values, output.labels)
    return metrics.compute(trained.class_names)


def _probe(
    config: DictConfig,
    trained: Trained,
    data: LabelledDataModule,
    stages: list[int] | None,
    compute: Compute,
    broken: Broken,
) -> tuple[ClassificationReport, dict[str, Any]]:
    """A simple classifier on features of the frozen network; it learns from one part and is judged by the other."""
    if config.probe == "knn" and data.is_multi_label:
        raise UserError("probe=knn needs one label per image: use probe=linear")
    train, held_out = (_features(config, trained, data, stages, compute, part) for part in (0, 1))
    broken += train.broken + held_out.broken
    names = data.class_names
    metrics = ClassificationMetrics(len(names), multi_label=data.is_multi_label)
    if config.probe == "linear":
        options: Any = OmegaConf.to_container(config.linear)
        probe = linear_probe(
            train.values, train.labels, held_out.values, held_out.labels, classes=len(names), **options
        )
        scores = {f"{penalty:g}": score for penalty, score in probe.scores.items()}
        metrics.to(probe.logits.device).update(probe.logits, held_out.labels)
        return metrics.compute(names), {"penalty": f"{probe.best:g}", "scores": scores}
    knn = KNN(train.values, train.labels, classes=len(names), **OmegaConf.to_container(config.knn))  # type: ignore[arg-type]
    predictions = knn.predict(held_out.values)
    scores = {str(k): accuracy(predicted, held_out.labels) for k, predicted in predictions.items()}
    best = max(knn.k, key=lambda k: scores[str(k)])
    logits = knn.scores(held_out.values)[best].clamp(min=1e-6).log()  # a class without a vote is not impossible
    metrics.to(logits.device).update(logits, held_out.labels)
    return metrics.compute(names), {"k": str(best), "scores": scores}


def _features(
    config: DictConfig,
    trained: Trained,
    data: LabelledDataModule,
    stages: list[int] | None,
    compute: Compute,
    part: int,
) -> Features:
    """Of the images to learn from (part 0) or held out (1); those that are on the disk already are read back."""
    name = ("train", "val")[part]
    indices = indices_of(name, data, trained)
    function = feature_function(trained.net, stages)

    def make() -> Features:
        with progress_bar() as bar:
            task = bar.add_task(f"features, {name}", total=len(indices))
            return labelled_features(
                data, indices, trained.preparation, function, compute,
                advance=lambda images: bar.advance(task, images),
            )  # fmt: skip

    made_of = {
        "weights": weights_digest(trained.net),
        "data": [data.fingerprint(), data_options(config.data), str(Path.cwd())],
        "files": _files_digest(data, indices),
        "indices": list(indices),
        "preparation": asdict(trained.preparation),
        "stages": stages,
        "precision": str(config.precision),
    }
    return FeatureCache(result_folder(config)).get(made_of, make).to(compute.torch_device)


def _files_digest(data: LabelledDataModule, indices: Sequence[int]) -> str:
    """Changes when a file is another one, although its name is the same."""
    digest = hashlib.sha256()
    if isinstance(data, ShardedDataModule):
        digest.update(data.sharded.content().encode())
    if isinstance(data.source, Folder):
        digest.update(str(data.source.path.resolve()).encode())
        for index in indices:
            with contextlib.suppress(OSError):  # one that cannot be read is reported when it is
                status = (data.source.path / data.source.sample_id(index)).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _told(found: dict[str, Any]) -> list[str]:
    """The scores of all settings of a probe, a line each."""
    setting = "k" if "k" in found else "penalty"
    return [
        f"{setting} {name}: {score:.2%}{' (best: the numbers above)' if name == found[setting] else ''}"
        for name, score in found.get("scores", {}).items()
    ]


if __name__ == "__main__":
    run("evaluate", evaluate)
