"""What the Lightning modules share: a step is a function of the weights, the batch and its number."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from fcmae.checkpoints.export import export_network
from fcmae.data.randomness import mix_seed
from fcmae.data.source import Batch
from fcmae.training.optimization import AdamW
from fcmae.training.sharding import all_devices, shard, whole, whole_weights


class TrainingModule(L.LightningModule):
    """Trains something with AdamW, its rate set before every step.

    Args:
        optim: optimiser and schedule.
        seed: of whatever a step draws.
        description: how the model and its input are made, as plain data; goes into every checkpoint.

    Attributes:
        effective_batch: images per optimiser step, over accumulation, devices and nodes; to be set before the fit.
        standing: what a checkpoint that is the best so far says of itself; empty in others.
        validated_at: optimiser steps done at the latest validation.
    """

    instead_of_demonstration = ""
    """What to type for images of one's own."""

    def __init__(self, *, optim: AdamW, seed: int, description: dict[str, Any]) -> None:
        super().__init__()
        self.optim = optim
        self.seed = seed
        self.description = description
        self.effective_batch = 0
        self.standing: dict[str, Any] = {}
        self.validated_at = -1
        self._step_losses: list[Tensor] = []

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network that the optimiser trains."""

    @property
    def networks(self) -> list[nn.Module]:
        """What has parameters, the trained network first."""
        return [self.trained]

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch of normalised images."""

    def example(self, images: Tensor) -> Batch:
        """A batch of images as they come from no source, (B, C, H, W) float32, to try a step with."""
        return Batch(images, [""] * len(images), torch.zeros(len(images), dtype=torch.int64, device=images.device), [])

    @property
    def epoch(self) -> int:
        """From 1, of the step that was computed last. Lightning counts on at the end of a fit, wherever that is."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return min(self.current_epoch + fitting, self.trainer.max_epochs or 1)

    @abstractmethod
    def compile_network(self) -> None:
        """From here on, the network goes through torch.compile."""

    @property
    def described(self) -> dict[str, Any]:
        """The description of the weights as they are now."""
        return self.description | {"step": self.global_step}

    def check_device(self, device: torch.device) -> None:  # most work on any
        """Refuses a device on which the network cannot run.

        Raises:
            UserError: says why.
        """

    @abstractmethod
    def report(self) -> list[str]:
        """What is trained, for people, a line each."""

    def configure_model(self) -> None:
        """Shards the networks, if the strategy has said over which devices."""
        if self.device_mesh is not None:
            devices = all_devices(self.device_mesh.device_type)
            for network in self.networks:
                shard(network, devices)

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the weights for others to load; to be called on all ranks.

        Raises:
            UserError: they cannot be written; an earlier export is untouched.
        """

    def export_weights(self, net: nn.Module, file: Path, description: dict[str, Any]) -> None:
        """Writes a network's weights, for `export`."""
        weights = whole_weights(net)
        if self.trainer.is_global_zero:
            export_network(weights, file, description)

    @abstractmethod
    def validation_line(self) -> str:
        """What the latest validation found, for people."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # So a resumed run draws (drop path, mixed images) what it would have drawn: no state to save, none to lose. The
        # batches of several ranks are numbered as EpochSampler deals them out, which one rank alone would get in turn.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        place = micro_batch * self.trainer.world_size + self.global_rank
        torch.manual_seed(mix_seed("step", self.seed, self.global_step, place))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, kept for the log."""
        loss = self.loss(batch)
        self._step_losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        losses, self._step_losses = self._step_losses, []
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # what is logged is read from the device, and that makes it wait
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log("train_loss", torch.stack(losses).mean(), sync_dist=True)
        self.log("lr", max(group["lr"] for group in optimizer.param_groups))
        self.log("grad_norm", whole(torch.nn.utils.get_total_norm(gradients)))

    def on_validation_end(self) -> None:
        self.validated_at = self.global_step

    def configure_optimizers(self) -> Any:
        """AdamW with the rate of each group of parameters set before every step."""
        steps = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        peak = self.optim.peak_lr(self.effective_batch)
        # Before a fused optimiser's step Lightning clips no gradients, and leaves them scaled, as 16-mixed has them.
        fused = not self.trainer.gradient_clip_val and self.trainer.precision != "16-mixed"
        optimizer = self.optim.optimizer(self.trained, lr=peak, fused=fused)
        factors = self.optim.factors(optimizer.param_groups, peak=peak, steps=steps, steps_per_epoch=steps_per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        optimizer.register_load_state_dict_post_hook(_lay_out_like_parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning goes on after so many batches; on another number of devices a step is made of more, or of fewer.
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        before = counts["total"]["ready"] // checkpoint["global_step"]
        for part in (counts["total"], counts["current"]):
            ready, now = part["ready"], part["ready"] // before * self.trainer.accumulate_grad_batches
            part.update({name: value + now - ready for name, value in part.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fcmae"] = self.described | ({"best": self.standing} if self.standing else {})


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    # A checkpoint's moments may lie in memory row by row, the parameters channels-last. The fused AdamW walks through
    # both in the order of the memory, without a look at strides.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
