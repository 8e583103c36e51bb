"""`python -m fcmae.finetune +model=tiny checkpoint=outputs/pretrain/x data.path=DIR`: classification."""

from fcmae.stopping import watch

if __name__ == "__main__":
    watch()  # before the imports below, which take seconds

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from timm.utils import ModelEmaV3

from fcmae.checkpoints.format import describe, read_checkpoint
from fcmae.checkpoints.lineage import Lineage
from fcmae.checkpoints.load_into import load_into
from fcmae.checkpoints.weights import read_weights
from fcmae.command_line.config_check import check_choice, check_run, check_same_input
from fcmae.command_line.launch import build, run
from fcmae.command_line.run_setting import run_setting
from fcmae.data.labelled import LabelledDataModule
from fcmae.errors import UserError
from fcmae.training.classification import ClassificationModule
from fcmae.training.classification_loss import ClassificationLoss, balanced_weights
from fcmae.training.run_folder import RunFolder
from fcmae.training.session import Parts, train


def finetune(config: DictConfig) -> None:
    """Runs, or goes on with, the fine-tuning that a configuration describes.

    Args:
        config: as composed from `configs/finetune.yaml`.

    Raises:
        UserError: something that the user can mend.
    """
    check_run(config)
    check_same_input(config)
    check_choice(config, "mode", ("full", "linear", "head_then_full"))
    check_choice(config, "class_weights", ("none", "balanced"))
    _check_mode(config)
    command = f"python -m fcmae.predict checkpoint={config.run_dir} images=DIR out=predictions.csv"
    setting = run_setting(config, next_command=lambda eight_bits: command)

    def parts(folder: RunFolder) -> Parts:
        data = build(config.data)
        if not isinstance(data, LabelledDataModule):
            raise UserError(
                "data=folder has no labels: use data=imagefolder (a folder per class), data=table (a CSV file), "
                "data=webdataset or data=hf"
            )
        data.leave_out_broken = True
        earlier = None if config.resume == "never" else folder.newest_checkpoint()
        module, lines = _module(config, setting.config, data, earlier)

        return Parts(module=module, data=data, best_by=module.best_by, lines=lines)

    train(setting, parts)


def _module(
    config: DictConfig, plain: dict[str, Any], data: LabelledDataModule, earlier: Path | None
) -> tuple[ClassificationModule, list[str]]:
    """The classifier with its weights, and what is to be said of them."""
    counts = data.class_counts()
    batch_augment = build(config.batch_augment)
    batch_augment.check(batch_size=data.batch_size, multi_label=data.is_multi_label)
    net = build(config.model, num_classes=len(data.class_names))
    lineage: Lineage = []
    if earlier is not None:  # what it started from may be gone by now
        lines, lineage = [], read_checkpoint(earlier)["fcmae"].get("lineage", [])
    elif config.checkpoint is None:
        lines = ["weights: fresh ones (checkpoint=null)"]
    else:
        weights = read_weights(config.checkpoint)
        theirs = (weights.description or {}).get("class_names", data.class_names)
        report = load_into(
            net,
            weights,
            adapt_in_chans=config.adapt_in_chans,
            keep_head=list(theirs) == data.class_names,
            strict=config.strict,
        )
        lines, lineage = report.lines(), weights.descent()
    class_weights = None
    if config.class_weights == "balanced":
        class_weights = balanced_weights(counts, len(data.split()[0]), multi_label=data.is_multi_label)
    module = ClassificationModule(
        net=net,
        optim=build(config.optim),
        loss=ClassificationLoss(
            label_smoothing=config.label_smoothing, class_weights=class_weights, multi_label=data.is_multi_label
        ),
        batch_augment=batch_augment,
        ema=_average(config, net),
        balanced="balanced" in (config.class_weights, data.sampling),
        linear=config.mode == "linear",
        seed=config.seed,
        description=describe(
            plain,
            task="classification",
            lineage=lineage,
            class_names=data.class_names,
            multi_label=data.is_multi_label,
            crop_pct=plain["augment"].get("crop_pct", 1.0),
        ),
    )
    return module, [*lines, f"classes: {len(counts)}, of {int(counts.min())} to {int(counts.max())} training images"]


def _average(config: DictConfig, net: Any) -> ModelEmaV3 | None:
    decay = config.ema.decay
    if decay is None:
        return None
    if not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise UserError(f"ema.decay={decay!r} must be a share in [0, 1), such as 0.9999, or null for no average")
    average = ModelEmaV3(net, decay=decay, use_warmup=config.ema.warmup)
    average.requires_grad_(False)  # or ranks would wait for its gradients
    return average


def _check_mode(config: DictConfig) -> None:
    head_epochs = config.optim.get("head_epochs", 0)
    if config.mode == "head_then_full" and not 0 < head_epochs < config.epochs:
        raise UserError(
            f"optim.head_epochs={head_epochs} must be above 0 and below epochs={config.epochs} with mode=head_then_full"
        )
    if config.mode != "head_then_full" and head_epochs:
        raise UserError(f"optim.head_epochs={head_epochs} needs mode=head_then_full, mode is {config.mode}")


if __name__ == "__main__":
    run("finetune", finetune)
