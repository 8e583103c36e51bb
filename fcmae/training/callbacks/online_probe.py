"""A probe of the frozen encoder beside pre-training: does what it learns tell classes apart?"""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from timm.models.convnext import ConvNeXt

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.digits import DigitsDataModule
from fcmae.data.imagefolder import ImageFolderDataModule
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.preparation import Preparation
from fcmae.evaluation.knn import KNN, accuracy
from fcmae.evaluation.linear_probe import linear_probe
from fcmae.inference.batches import Compute
from fcmae.inference.features import Features, check_stages, feature_function, labelled_features
from fcmae.training.callbacks.ranks import Ranks
from fcmae.training.pretraining import PretrainModule
from fcmae.training.sharding import gathered


class OnlineProbe(L.Callback):
    """Logs `val_knn_acc1` or `val_linear_acc1`: top-1 of a probe on a small labelled set of its own.

    It has no part in the loss, the gradients or the random numbers of training. The first rank does the work while the
    others wait, as long as that takes; where the network is sharded, all do the same.

    Args:
        kind: `knn` (k = 20, or all images if they are fewer) or `linear`, see `fcmae.evaluation`.
        data: a folder with a folder per class, as `data=imagefolder` takes it, or `digits`.
        every_n_epochs: how often.
        stages: features: some of [1, 2, 3, 4], averaged over positions; None: the last one, normalised.
        images: those of the pre-training, whose size, channels, normalisation and workers the probe takes over.

    Raises:
        UserError: no such images, or a stage that there is none of.
    """

    def __init__(
        self,
        *,
        kind: Literal["knn", "linear"],
        data: str,
        every_n_epochs: int,
        stages: Sequence[int] | None,
        images: ImageDataModule,
    ) -> None:
        check_stages(stages)
        self.kind = kind
        self.metric = f"val_{kind}_acc1"
        self.every_n_epochs = every_n_epochs
        self.stages = stages
        self.data = _labelled(data, images)
        self.data.split()  # finds the images, or says that there are none
        mean, std = images.numbers
        self.preparation = Preparation(image_size=images.size, mean=tuple(mean), std=tuple(std), crop_pct="auto")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.current_epoch + 1 >= (trainer.max_epochs or 1)
        if trainer.sanity_checking or (not last and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        assert isinstance(pl_module, PretrainModule)
        (ranks,) = (callback for callback in trainer.callbacks if isinstance(callback, Ranks))  # type: ignore[attr-defined]
        with gathered(pl_module.model) as by_all:
            if by_all:
                score = trainer.strategy.broadcast(self.score(pl_module))
            else:
                score = ranks.from_first(lambda: self.score(pl_module))
        pl_module.log(self.metric, score, rank_zero_only=False)

    def score(self, module: PretrainModule) -> float:
        """Top-1 accuracy on the probe's held-out images."""
        net, (train, held_out) = module.model.encoder.net, self.data.split()
        compute = Compute(
            batch_size=self.data.batch_size,
            num_workers=self.data.num_workers,
            device=str(module.device),
            precision="bf16" if "bf16" in str(module.trainer.precision) else 32,
            max_broken=self.data.max_broken,
        )
        learnt, judged = (self._features(net, indices, compute) for indices in (train, held_out))
        classes = len(self.data.class_names)
        if self.kind == "linear":
            probe = linear_probe(learnt.values, learnt.labels, judged.values, judged.labels, classes=classes)
            return probe.scores[probe.best]
        k = min(20, len(learnt.values))
        knn = KNN(learnt.values, learnt.labels, classes=classes, k=[k])
        return accuracy(knn.predict(judged.values)[k], judged.labels)

    def _features(self, net: ConvNeXt, indices: Sequence[int], compute: Compute) -> Features:
        return labelled_features(self.data, indices, self.preparation, feature_function(net, self.stages), compute)


def _labelled(data: str, images: ImageDataModule) -> LabelledDataModule:
    shared = ("image_size", "in_chans", "mean", "std", "batch_size", "num_workers", "timeout", "max_broken", "augment")
    options: dict[str, Any] = {name: getattr(images, name) for name in shared}
    options |= {"val_images": 512, "fraction": 1.0, "shots": None, "sampling": "uniform", "seed": 0}
    options |= {"repeats": 1, "samples_per_epoch": None}
    return DigitsDataModule(**options) if data == "digits" else ImageFolderDataModule(path=data, **options)
