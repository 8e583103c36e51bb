"""The YAML files: all compose and build, their keys are constructor arguments, their numbers are the published ones."""

import functools
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import lightning
import pytest
import timm
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from fcmae import FCMAE, Pixels, RandomMask, create_model
from fcmae.command_line.launch import config_folder
from fcmae.models.convnext import SIZES
from fcmae.training.batch_augment import BatchAugment

CONFIGS = config_folder()
OPTIONS = sorted(
    f"{file.parent.name}={file.stem}" for file in CONFIGS.glob("*/*.yaml") if not file.stem.startswith("_")
)
# What a choice needs beside itself.
NEEDS = {
    "data=folder": ["data.path=images"],
    "data=hf": ["data.path=images"],
    "data=imagefolder": ["data.path=images"],
    "data=table": ["data.path=images", "data.table=labels.csv"],
    "data=webdataset": ["data.path=images"],
    "experiment=fcmae": ["data.path=images"],
    "model=custom": ["model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]"],
}
BY_CREATE_MODEL_ALONE = {"mask_ratio", "patch_size", "norm_pix_loss"}  # in a config: the groups masking and target


def compose(*overrides: str, verb: str = "pretrain") -> DictConfig:
    return _composed(verb, *overrides).copy()


@functools.cache
def _composed(verb: str, *overrides: str) -> DictConfig:
    model = (
        []
        if any(override.startswith(("+model=", "experiment=finetune_in")) for override in overrides)
        else ["+model=atto"]
    )
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(verb, overrides=[*model, "run_name=test", *overrides])


def verbs(option: str) -> list[str]:
    """The verbs that an option is for."""
    group, _, choice = option.partition("=")
    if group in ("masking", "target") or option in (
        "experiment=fcmae",
        "experiment=smoke",
        "optim=adamw",
        "data=folder",
    ):
        return ["pretrain"]
    if group == "batch_augment" or choice == "randaugment" or choice.startswith("finetune"):
        return ["finetune"]
    return ["pretrain", "finetune"]


CASES = [(verb, option) for option in OPTIONS for verb in verbs(option)]


def compose_option(option: str, verb: str) -> DictConfig:
    needs = NEEDS.get(option, [])
    if verb == "finetune":
        without_path = option in ("data=digits", "data=fractal")
        needs = [*needs, "checkpoint=null", *([] if without_path else ["data.path=images"])]
    return compose(f"+{option}" if option.startswith("model=") else option, *needs, verb=verb)


def built(node: DictConfig, **overrides: Any) -> Any:
    return hydra.utils.instantiate(node, _convert_="all", **overrides)


def nodes(config: Any) -> list[dict[str, Any]]:
    if not isinstance(config, dict):
        return []
    here = [config] if "_target_" in config else []
    return here + [node for value in config.values() for node in nodes(value)]


def arguments(target: str) -> set[str]:
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters.values()
    assert not any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters)
    return {parameter.name for parameter in parameters}


def test_every_size_and_every_group_has_its_file():
    assert {option.removeprefix("model=") for option in OPTIONS if option.startswith("model=")} == {*SIZES, "custom"}
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert {option.partition("=")[0] for option in OPTIONS} == folders - {"hydra"}  # whose launcher is for sweeps


@pytest.mark.parametrize(("verb", "option"), CASES)
def test_keys_are_the_constructors_arguments(verb, option):
    config = OmegaConf.to_container(compose_option(option, verb), resolve=True)
    ours = [node for node in nodes(config) if node["_target_"].startswith("fcmae.")]
    assert len(ours) >= 5  # model, optim, data, augment and masking, target or batch_augment
    for node in ours:
        wanted = arguments(node["_target_"])
        if node["_target_"] == "fcmae.models.create.create_model":
            wanted -= BY_CREATE_MODEL_ALONE
        if node["_target_"] == "fcmae.models.classifier.create_classifier":
            wanted -= {"num_classes"}  # the data's
        assert set(node) - {"_target_"} == wanted, node["_target_"]
    theirs = set(config["trainer"]) - {"_target_"}
    assert theirs <= set(inspect.signature(lightning.Trainer).parameters)


@pytest.mark.parametrize(("verb", "option"), CASES)
def test_every_choice_builds(verb, option, tmp_path):
    config = compose_option(option, verb)
    config.run_dir = str(tmp_path / "run")
    if verb == "pretrain":
        with torch.device("meta"):
            model = built(config.model)
        assert isinstance(model, FCMAE)
        assert isinstance(model.masking, RandomMask)
        assert isinstance(model.target, Pixels)
        encoder = model.encoder.net
    else:
        with torch.device("meta"):
            encoder = built(config.model, num_classes=3)
        assert encoder.head.fc.out_features == 3
        assert isinstance(built(config.batch_augment), BatchAugment)
    assert [stage.blocks[0].conv_dw.out_channels for stage in encoder.stages] == list(config.model.dims)
    data = built(config.data)
    assert data.size == (config.data.image_size, config.data.image_size)
    assert built(config.optim).peak_lr(256) == config.optim.base_lr
    for name, logger in built(config.logger).items():
        assert isinstance(logger, lightning.pytorch.loggers.Logger), name
    if option in ("trainer=gpu", "trainer=ddp", "trainer=fsdp"):  # the machine that tests may have no GPU
        config.trainer.accelerator, config.trainer.devices = "cpu", 2 if option == "trainer=fsdp" else 1
    trainer = built(config.trainer, precision="32-true", logger=False, enable_checkpointing=False)
    assert trainer.max_epochs == config.epochs
    assert not (tmp_path / "run").exists()


def test_the_trainers_choices():
    assert compose("trainer=auto").trainer.accelerator == "auto"
    assert compose("trainer=cpu").trainer.accelerator == "cpu"
    assert compose("trainer=gpu").trainer.accelerator == "gpu"
    ddp = compose("trainer=ddp").trainer
    assert (ddp.devices, ddp.strategy) == (-1, "ddp")


def test_a_default_of_python_is_the_same_in_yaml():
    # With no group data, masking or target beside it to take values from.
    options = OmegaConf.create({"model": OmegaConf.load(CONFIGS / "_autoencoder.yaml")}).model
    options.size = "custom"  # has to be chosen
    for name, parameter in inspect.signature(create_model).parameters.items():
        if name in BY_CREATE_MODEL_ALONE:
            continue
        value = None if OmegaConf.is_missing(options, name) else options[name]
        assert value == parameter.default, name


@pytest.mark.parametrize(
    ("file", "function"), [("masking/random.yaml", RandomMask), ("target/normalized_pixels.yaml", Pixels)]
)
def test_a_default_of_create_model_is_the_same_in_its_group(file, function):
    in_yaml = yaml.safe_load((CONFIGS / file).read_text())
    for name, parameter in inspect.signature(function).parameters.items():
        assert in_yaml[name] == parameter.default, name
        assert inspect.signature(create_model).parameters[name].default is None, name  # that of `function`
        with torch.device("meta"):
            model = create_model("atto")
        (part,) = (part for part in (model.masking, model.target) if isinstance(part, function))
        assert in_yaml[name] == getattr(part, name), name


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_timms(size):
    with torch.device("meta"):
        theirs = timm.create_model(f"convnextv2_{size}")  # with its 1000-class head
    config = compose(f"+model={size}").model
    assert config.size == size
    assert list(config.depths) == [len(stage.blocks) for stage in theirs.stages]
    assert list(config.dims) == [stage.blocks[-1].conv_dw.out_channels for stage in theirs.stages]

    comment = (CONFIGS / "model" / f"{size}.yaml").read_text().splitlines()[0]
    found = re.match(r"# (\d+(?:\.(\d+))?) M parameters with a 1000-class head", comment)
    assert found, comment
    millions = sum(parameter.numel() for parameter in theirs.parameters()) / 1e6
    assert round(millions, len(found.group(2) or "")) == float(found.group(1))


@pytest.mark.parametrize("size", ["atto", "base", "huge"])
def test_the_published_recipe(size):
    config = compose(f"+model={size}", "experiment=fcmae", "data.path=images")
    optim, data, model, trainer = config.optim, config.data, config.model, config.trainer
    assert (optim.base_lr, optim.min_lr, optim.weight_decay) == (1.5e-4, 0, 0.05)
    assert (list(optim.betas), optim.warmup_epochs) == ([0.9, 0.95], 40)
    assert (config.epochs, trainer.max_epochs, trainer.max_steps, config.effective_batch) == (800, 800, -1, 4096)
    assert 4096 % data.batch_size == 0
    assert (data.image_size, list(config.augment.crop_scale), config.augment.flip, data.in_chans) == (
        224,
        [0.2, 1.0],
        True,
        3,
    )
    assert list(data.mean) == [0.485, 0.456, 0.406]
    assert list(data.std) == [0.229, 0.224, 0.225]
    assert (model.masking.mask_ratio, model.masking.patch_size) == (0.6, 32)
    assert model.target.norm_pix_loss is True
    assert (model.decoder_depth, model.decoder_dim, model.drop_path_rate) == (1, 512, 0)
    assert (model.image_size, model.in_chans) == (224, 3)
    assert trainer.gradient_clip_val is None
    assert trainer.limit_train_batches is None
    assert config.data._target_ == "fcmae.data.folder.FolderDataModule"


def test_comments_with_a_command_are_right():
    """`+model=custom ...` in custom.yaml is a whole command line; it must build."""
    comment = (CONFIGS / "model" / "custom.yaml").read_text().splitlines()[0]
    config = compose(*re.findall(r"\+?model\S*=\S+", comment))
    with torch.device("meta"):
        model = built(config.model)
    assert [len(stage.blocks) for stage in model.encoder.net.stages] == list(config.model.depths)


def test_configs_are_found_beside_the_package_or_inside():
    assert Path(CONFIGS).is_absolute()
    assert (CONFIGS / "pretrain.yaml").is_file()
