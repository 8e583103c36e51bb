"""What the verbs that use a trained network share: options, progress, skipped images, the end."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fcmae.command_line.config_check import check_choice, check_kinds
from fcmae.data.folder import Folder, find_images
from fcmae.errors import UserError
from fcmae.files import write_text
from fcmae.inference.batches import Compute, Output, outputs
from fcmae.inference.features import check_stages
from fcmae.inference.trained import Trained, load_trained


@dataclass
class Work:
    """What is to be done, and what came of it.

    Attributes:
        trained: the network.
        images: where they are.
        compute: how.
        out: file of the results.
        broken: (sample id, reason) of images that could not be read.
    """

    trained: Trained
    images: Folder
    compute: Compute
    out: Path
    broken: list[tuple[str, str]] = field(default_factory=list)

    def outputs(self, apply: Callable[[Tensor], Tensor]) -> Iterator[Output]:
        """What `apply` makes of the images, in the order of their paths, with a progress bar."""
        self.compute.place(self.trained.net)
        with progress_bar() as bar:
            task = bar.add_task("images", total=len(self.images))
            yield from outputs(
                self.images,
                range(len(self.images)),
                self.trained.preparation,
                apply,
                self.compute,
                broken=self.broken,
                advance=lambda images: bar.advance(task, images),
            )
        if len(self.broken) == len(self.images):
            name, reason = self.broken[-1]
            raise UserError(f"none of {len(self.images)} images can be read, the last one {name} ({reason})")

    def say_done(self) -> None:
        """Says what was written, and lists the skipped images beside it."""
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"images: {len(self.images) - len(self.broken)}, in {self.out}", markup=False)
        listed = self.out.with_name(f"{self.out.name}.skipped.jsonl")
        if self.broken:
            lines = (json.dumps({"id": name, "reason": reason}) for name, reason in self.broken)
            write_text(listed, "".join(f"{line}\n" for line in lines))
            console.print(f"images that could not be read: {len(self.broken)}, in {listed}", markup=False)
        else:
            listed.unlink(missing_ok=True)  # of an earlier time


def open_work(config: Any) -> Work:
    """What a configuration with `checkpoint`, `images`, `out` and the options of `Compute` asks for.

    Raises:
        UserError: something that the user can mend.
    """
    compute = compute_options(config)
    out = Path(config.out)
    if not out.parent.is_dir():
        raise UserError(f"out={config.out}: the folder {out.parent} does not exist; make it, or name another")
    trained = load_trained(config.checkpoint, ema=config.ema, image_size=image_sides(config.image_size))
    root, names = find_images([Path(config.images)])
    images = Folder(path=root, in_chans=trained.preparation.in_chans, names=names)
    return Work(trained, images, compute, out)


def compute_options(config: Any) -> Compute:
    """Those that every configuration for a trained network has."""
    names = ("batch_size", "num_workers", "device", "precision", "max_broken")
    check_kinds(config, Compute, names)
    if not isinstance(config.checkpoint, str):
        raise UserError(f"checkpoint={config.checkpoint} must be text: a run's folder, a checkpoint, an export")
    check_choice(config, "ema", (None, True, False))
    return Compute(**{name: config[name] for name in names})


def image_sides(image_size: Any) -> tuple[int, int] | None:
    """One side or two.

    Raises:
        UserError: neither.
    """
    sides = [image_size] * 2 if isinstance(image_size, int) else image_size
    if sides is None:
        return None
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 32 for side in sides):
        raise UserError(f"image_size={image_size} must be one side or two, [height, width], from 32 pixels")
    return sides[0], sides[1]


def stage_numbers(stages: Any) -> list[int] | None:
    """One stage or several, of an option.

    Raises:
        UserError: no stage of a ConvNeXt.
    """
    numbers = [stages] if isinstance(stages, int) else None if stages is None else list(stages)
    check_stages(numbers)
    return numbers


def progress_bar() -> Progress:
    """Images done, share, time left; on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
