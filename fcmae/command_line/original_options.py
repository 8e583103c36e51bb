"""The original implementation's options in our words, for those who type them as they are used to.

Source: its main_pretrain.py and main_finetune.py (https://github.com/facebookresearch/ConvNeXt-V2).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

_BOTH = {
    "model": "+model=",
    "input_size": "data.image_size=",
    "batch_size": "data.batch_size=",
    "epochs": "epochs=",
    "warmup_epochs": "optim.warmup_epochs=",
    "blr": "optim.base_lr=",
    "min_lr": "optim.min_lr=",
    "weight_decay": "optim.weight_decay=",
    "output_dir": "run_dir=",
    "seed": "seed=",
    "num_workers": "data.num_workers=",
    "save_ckpt_num": "save.keep=",
}
_RENAMED = {
    "pretrain": {
        **_BOTH,
        "data_path": "data=imagefolder data.path=",  # theirs is DIR/train
        "mask_ratio": "masking.mask_ratio=",
        "decoder_depth": "model.decoder_depth=",
        "decoder_embed_dim": "model.decoder_dim=",
    },
    "finetune": {
        **_BOTH,
        "data_path": "data.path=",
        "finetune": "checkpoint=",
        "drop_path": "model.drop_path_rate=",
        "head_init_scale": "model.head_init_scale=",
        "layer_decay": "optim.layer_decay=",
        "layer_decay_type": "optim.layer_decay_kind=",
        "clip_grad": "trainer.gradient_clip_val=",
        "model_ema_decay": "ema.decay=",
        "smoothing": "label_smoothing=",
        "aa": "augment.randaugment=",
        "color_jitter": "augment.color_jitter=",
        "reprob": "batch_augment.random_erasing=",
        "mixup": "batch_augment.mixup=",
        "cutmix": "batch_augment.cutmix=",
        "crop_pct": "augment.crop_pct=",
    },
}
_OTHERWISE = {
    "update_freq": "give effective_batch=, their batch_size x update_freq x GPUs",
    "lr": "give optim.base_lr=, the rate per 256 images of a step",
    "norm_pix_loss": "it is the default; target=raw_pixels is without",
    "save_ckpt_freq": "give save.every_n_steps=, in steps",
    "log_dir": "give logger=tensorboard",
    "device": "give trainer=cpu, trainer=gpu or trainer=ddp",
    "resume": "the same command typed again goes on",
    "auto_resume": "the same command typed again goes on",
    "model_ema": "give ema.decay=0.9999",
    "model_ema_eval": "a moving average is always validated beside the weights",
    "nb_classes": "the data's classes are counted",
    "eval": "use python -m fcmae.evaluate",
    "eval_data_path": "data.path= holds train and val",
    "data_set": "give data=imagefolder, or another source",
    "use_amp": "give trainer.precision=bf16-mixed",
}


class Translated(NamedTuple):
    """What a command line of theirs would be here."""

    options: list[str]
    """`key=value`, as one would type them."""
    notes: list[str]
    """Of options that have no such counterpart, or that nobody knows: `--name: what to do instead`."""


def renamed(verb: str) -> dict[str, str]:
    """The original's names, each with what to write instead, up to the value."""
    return _RENAMED.get(verb, {})


def otherwise() -> dict[str, str]:
    """The original's names that have no counterpart, each with what to do instead."""
    return _OTHERWISE


def translate(verb: str, arguments: Sequence[str], *, known: Collection[str] = ()) -> Translated:
    """A command line with `--name value` or `--name=value`; what is written `key=value` stays as it is.

    Args:
        verb: entry point, such as `pretrain`.
        arguments: of its command line.
        known: names of ours, which only want another way of writing.
    """
    options, notes, rest = list[str](), list[str](), list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if "=" in argument:
                options.append(argument)
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            value = rest.pop(0)
        theirs = name.replace("-", "_")
        if theirs in renamed(verb):
            value = value.removeprefix("convnextv2_") if theirs == "model" else value
            *before, key = renamed(verb)[theirs].split()
            options += [*before, f"{key}{value or 'VALUE'}"]
        elif name in known or "." in name:
            options.append(f"{name}={value or 'VALUE'}")
        else:
            notes.append(f"--{name}: {_OTHERWISE.get(theirs, 'is not known here')}")
    return Translated(options, notes)
