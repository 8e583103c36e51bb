"""AdamW's groups and the learning rate of every step, as the published recipe has them (paper table 8)."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcmae import FCMAE, UserError, create_model
from fcmae.data.digits import DigitsDataModule
from fcmae.data.transforms import Crop
from fcmae.training.geometry import choose_precision, set_accumulation
from fcmae.training.optimization import AdamW, parameter_groups
from fcmae.training.pretraining import PretrainModule

RECIPE: dict[str, Any] = {
    "base_lr": 1.5e-4,
    "min_lr": 0.0,
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "warmup_epochs": 40,
}


def micro_model() -> FCMAE:
    return create_model(depths=[1, 1, 1, 1], dims=[8, 16, 32, 64], decoder_dim=16, image_size=64)


def published_rate(step: int, *, peak: float, min_lr: float, warmup: float, steps: int) -> float:
    """The original code's adjust_learning_rate, in steps instead of fractional epochs."""
    if step < warmup:
        return peak * step / warmup
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Watch(L.Callback):
    """Notes what the optimiser is about to use."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.betas: set[tuple[float, float]] = set()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        self.rates.append(rates.pop())
        self.betas |= {group["betas"] for group in optimizer.param_groups}


def fit(optim: AdamW, *, epochs: int, micro_batches: int, effective_batch: int | None = None) -> tuple[Watch, int]:
    data = DigitsDataModule(
        image_size=64,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        batch_size=4,
        val_images=4,
        augment=Crop(crop_scale=[0.5, 1.0], flip=False),
        fraction=1.0,
        shots=None,
        sampling="uniform",
        num_workers=0,
        max_broken=0.0,
        timeout=600,
        repeats=1,
        samples_per_epoch=None,
        seed=0,
    )
    module, watch = PretrainModule(model=micro_model(), optim=optim, seed=0, description={}), Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=micro_batches,
        limit_val_batches=0,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module.effective_batch = set_accumulation(trainer, batch_size=data.batch_size, effective_batch=effective_batch)
    trainer.fit(module, datamodule=data)
    return watch, module.effective_batch


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("epochs", "micro_batches", "effective_batch", "warmup_epochs", "min_lr"),
    [(3, 4, None, 1, 0.0), (2, 6, 8, 0.5, 1e-5), (2, 6, 12, 0, 1e-5), (2, 3, None, 1.5, 0.0)],
    ids=["plain", "accumulated", "no warm-up", "a long warm-up"],
)
def test_the_rate_of_every_step_of_a_run(epochs, micro_batches, effective_batch, warmup_epochs, min_lr):
    optim = AdamW(**{**RECIPE, "warmup_epochs": warmup_epochs, "min_lr": min_lr, "base_lr": 0.01})
    watch, effective = fit(optim, epochs=epochs, micro_batches=micro_batches, effective_batch=effective_batch)
    assert effective == (effective_batch or 4)
    steps_per_epoch = micro_batches * 4 // effective
    steps, warmup, peak = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch, 0.01 * effective / 256
    wanted = [published_rate(step, peak=peak, min_lr=min_lr, warmup=warmup, steps=steps) for step in range(steps)]
    assert watch.rates == pytest.approx(wanted, rel=1e-12)
    assert watch.betas == {(0.9, 0.95)}


def test_the_published_peak():
    assert AdamW(**RECIPE).peak_lr(4096) == pytest.approx(2.4e-3)
    assert AdamW(**RECIPE).peak_lr(256) == 1.5e-4
    assert AdamW(**RECIPE).peak_lr(64) == pytest.approx(1.5e-4 / 4)


@given(
    steps=st.integers(1, 2000),
    share=st.floats(0, 2),
    peak=st.floats(1e-6, 1),
    floor=st.floats(0, 1),
    step=st.integers(0, 2000),
)
def test_the_rate_stays_between_its_ends(steps, share, peak, floor, step):
    optim = AdamW(**{**RECIPE, "min_lr": floor * peak})
    rate = optim.lr_at(min(step, steps), peak=peak, steps=steps, warmup_steps=share * steps)
    assert 0 <= rate <= peak * (1 + 1e-12)
    if min(step, steps) >= share * steps:
        assert rate >= optim.min_lr * (1 - 1e-12)


def test_the_ends_of_the_schedule():
    optim = AdamW(**{**RECIPE, "min_lr": 1e-6})
    ends = {step: optim.lr_at(step, peak=1.0, steps=100, warmup_steps=10) for step in (0, 5, 10, 55, 100)}
    assert ends == pytest.approx({0: 0, 5: 0.5, 10: 1, 55: (1 + 1e-6) / 2, 100: 1e-6})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_rate_of_zero_trains_nothing_and_divides_by_nothing():
    watch, _ = fit(AdamW(**{**RECIPE, "base_lr": 0.0}), epochs=1, micro_batches=2)
    assert watch.rates == [0, 0]


def test_groups_hold_every_trained_parameter_once():
    model = micro_model()
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [names[parameter] for group in (decayed, plain) for parameter in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(names.values()) - set(grouped) == {"encoder.net.head.norm.weight", "encoder.net.head.norm.bias"}

    decayed_names = {names[parameter] for parameter in decayed["params"]}
    kernels = ("stem.0", "conv_dw", "fc1", "fc2", "downsample.1", "decoder.proj", "decoder.pred")
    assert decayed_names == {name for name in names.values() if name.endswith(tuple(f"{k}.weight" for k in kernels))}
    assert "decoder.mask_token" in grouped


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_optimizer_decays_what_it_should_and_nothing_else():
    """With no gradient, a step of AdamW is the decay alone: p - lr * weight_decay * p."""
    model = micro_model()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1.0)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    AdamW(**RECIPE).optimizer(model, lr=0.1).step()
    for name, parameter in model.named_parameters():
        kernel = parameter.ndim > 1 and name != "decoder.mask_token"
        assert torch.allclose(parameter, torch.tensor(1 - 0.1 * 0.05 if kernel else 1.0)), name


@pytest.mark.parametrize("name", ["base_lr", "min_lr", "weight_decay", "warmup_epochs"])
@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_numbers_out_of_bounds(name, value):
    with pytest.raises(UserError, match=f"optim.{name}={value} must be a number from 0"):
        AdamW(**{**RECIPE, name: value})


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.95, 0.99), (0.9, math.nan)])
def test_bad_betas(betas):
    with pytest.raises(UserError, match=r"optim.betas=\[.*\] must be two numbers in \[0, 1\)"):
        AdamW(**{**RECIPE, "betas": betas})


def test_the_effective_batch():
    trainer = L.Trainer(accelerator="cpu", devices=2, num_nodes=3, logger=False, enable_checkpointing=False)
    assert set_accumulation(trainer, batch_size=4, effective_batch=None) == 24
    assert trainer.accumulate_grad_batches == 1
    assert set_accumulation(trainer, batch_size=4, effective_batch=120) == 120
    assert trainer.accumulate_grad_batches == 5
    told = "effective_batch=100 is not a multiple of 24 = data.batch_size=4 x 2 devices x 3 nodes"
    with pytest.raises(UserError, match=told):
        set_accumulation(trainer, batch_size=4, effective_batch=100)


def test_precisions():
    assert choose_precision("auto", "cpu") == "32-true"
    for setting, chosen in {32: "32-true", "32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}.items():
        assert choose_precision(setting, "cpu") == chosen
    with pytest.raises(UserError, match=r"trainer.precision='64' is unknown: use one of auto, 32-true"):
        choose_precision(64, "cpu")
