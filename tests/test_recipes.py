"""The published fine-tuning recipes, number by number (paper tables 9 to 13 and the authors' code)."""

import functools
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from fcmae.command_line.launch import config_folder

# Columns: base LR, weight decay, layer decay, its kind, warm-up, epochs, smoothing, mixup, cutmix, drop path.
IN1K = {
    "atto": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0, 0, 0.1),
    "femto": (2e-4, 0.05, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "pico": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "nano": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.5, 0.5, 0.1),
    "tiny": (8e-4, 0.05, 0.9, "single", 40, 300, 0.1, 0.8, 1, 0.2),
    "base": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1, 0.1),
    "large": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1, 0.2),
    "huge": (1.25e-3, 0.05, 0.75, "single", 10, 50, 0.1, 0.8, 1, 0.3),
}
IN22K = {
    "nano": (2.5e-4, 0.05, 0.9, "single", 5, 90, 0.1, 0.8, 1, 0),
    "tiny": (2.5e-4, 0.05, 0.9, "single", 5, 90, 0.1, 0.8, 1, 0),
    "base": (2.5e-4, 0.05, 0.8, "single", 5, 90, 0.1, 0.8, 1, 0.1),
    "large": (2.5e-4, 0.05, 0.8, "single", 5, 90, 0.1, 0.8, 1, 0.1),
    "huge": (2.5e-4, 0.05, 0.8, "single", 5, 90, 0.1, 0.8, 1, 0.3),
}
AFTER_IN22K = {
    "nano": (2.5e-5, 1e-8, 0.9, "single", 0, 90, 0.1, 0, 0, 0.1),
    "tiny": (2.5e-5, 1e-8, 0.9, "single", 0, 90, 0.1, 0, 0, 0.1),
    "base": (2.5e-5, 1e-8, 0.8, "single", 0, 30, 0.1, 0, 0, 0.2),
    "large": (2.5e-5, 1e-8, 0.8, "single", 0, 30, 0.1, 0, 0, 0.3),
    "huge": (2.5e-5, 1e-8, 0.85, "single", 0, 30, 0.1, 0, 0, 0.5),
}
RECIPES = {f"finetune_in1k_{size}": (size, values, 1024, 0.9999, 224) for size, values in IN1K.items()}
RECIPES |= {f"finetune_in22k_{size}": (size, values, 4096, None, 224) for size, values in IN22K.items()}
for _size, _values in AFTER_IN22K.items():
    for _side in (224, 384, 512) if _size == "huge" else (224, 384):
        _name = f"finetune_in1k_after_in22k_{_size}" + (f"_{_side}" if _side != 224 else "")
        RECIPES[_name] = (_size, _values, 512, None if _size == "huge" else 0.9999, _side)


@functools.cache
def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("finetune", overrides=["checkpoint=null", "data.path=images", *overrides])


def test_every_recipe_has_its_file_and_every_file_its_recipe() -> None:
    files = {file.stem for file in Path(config_folder(), "experiment").glob("finetune_in*.yaml")}
    assert files == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_published_one(name: str) -> None:
    size, values, batch, average, side = RECIPES[name]
    config = compose(f"experiment={name}", "run_name=x")
    optim, mixing = config.optim, config.batch_augment
    assert (
        optim.base_lr, optim.weight_decay, optim.layer_decay, optim.layer_decay_kind, optim.warmup_epochs,
        config.epochs, config.label_smoothing, mixing.mixup, mixing.cutmix, config.model.drop_path_rate,
    ) == values  # fmt: skip
    assert (config.effective_batch, config.ema.decay, config.ema.warmup) == (batch, average, False)
    assert (config.model.size, config.data.image_size) == (size, side)
    assert batch % config.data.batch_size == 0
    # The same for all of them.
    assert (list(optim.betas), optim.min_lr, optim.head_epochs, config.mode) == ([0.9, 0.999], 1e-6, 0, "full")
    assert (config.augment.randaugment, mixing.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (list(config.augment.crop_scale), config.augment.flip, config.augment.crop_pct) == ([0.08, 1], True, "auto")
    assert (config.model.head_init_scale, config.class_weights) == (0.001, "none")
    assert config.trainer.gradient_clip_val is None
    assert list(config.data.mean) == [0.485, 0.456, 0.406]
    assert list(config.data.std) == [0.229, 0.224, 0.225]


def test_a_model_that_is_named_too_is_taken() -> None:
    config = compose("experiment=finetune_in1k_tiny", "+model=base")
    assert (config.model.size, list(config.model.dims)) == ("base", [128, 256, 512, 1024])
    assert config.epochs == 300


def test_the_recipe_names_its_run() -> None:
    names = {compose(f"experiment={name}").run_name for name in RECIPES}
    assert len(names) == len(RECIPES)


@pytest.mark.parametrize("option", ["experiment=finetune_in1k_atto", "experiment=finetune_small_data"])
@pytest.mark.parametrize("choice", ["mix", "none", "erase"])
def test_a_group_that_is_typed_is_taken(option: str, choice: str) -> None:
    overrides = [option, f"batch_augment={choice}", "+model=atto", "run_name=x"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("finetune", overrides=["checkpoint=null", "data.path=images", *overrides])
    wanted = {"mix": (0.25, 0.8, 1.0), "none": (0, 0, 0), "erase": (0.25, 0, 0)}[choice]
    mixing = config.batch_augment
    assert (mixing.random_erasing, mixing.mixup, mixing.cutmix) == wanted
