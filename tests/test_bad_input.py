"""What users get wrong, and what breaks under them: one line that says what to do, and nothing lost."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO, RUN, content, pretrain, write_images

import fcmae
from fcmae.data.datamodule import ImageDataModule
from fcmae.data.sampler import EpochSampler
from fcmae.data.transforms import Crop
from fcmae.training.json_lines import JsonLinesLogger
from fcmae.training.pretraining import PretrainModule

FOLDER = [*MICRO, "data=folder", "data.num_workers=0", "data.batch_size=4", "data.path=images"]
EVERY_STEP = "save.every_n_steps=1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run has ended; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    result = pretrain(folder, *MICRO)
    assert result.code == 0, result.err
    return folder


def load_finite(run: Path) -> fcmae.FCMAE:
    model = fcmae.load(run)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model


def steps_saved(folder: Path) -> list[int]:
    return [int(file.stem.rpartition("=")[2]) for file in sorted((folder / RUN / "checkpoints").glob("epoch=*.ckpt"))]


BAD_VALUES = {
    "data.image_size=100": "image size 100x100 is not a multiple of the 32-pixel mask patch: .* 100 use 96 or 128",
    "data.image_size=[64,100]": "image size 64x100 is not a multiple of the 32-pixel mask patch: .* 96 or 128",
    "data.image_size=0": "image size 0x0 is not a multiple of the 32-pixel mask patch: instead of 0 use 32",
    "data.image_size=-32": "image size -32x-32 is not a multiple of the 32-pixel mask patch: instead of -32 use 32",
    "data.image_size=[64,96,32]": "data.image_size=.64, 96, 32. .*",
    "data.image_size=big": r"(data|model)\.image_size='big' must be a whole number.*",
    "masking.mask_ratio=1": r"mask_ratio=1 is outside \[0, 1\): give the share to hide, such as 0.6",
    "masking.mask_ratio=-0.1": r"mask_ratio=-0.1 is outside \[0, 1\): .*",
    "masking.mask_ratio=0.8": "mask_ratio=0.8 leaves none of 4 patches visible: use a ratio .* 0.75 or larger images",
    "masking.mask_ratio=0": "mask_ratio=0 hides none of the 4 patches of a 64x64 image, .* use a ratio above 0",
    "masking.patch_size=48": "patch_size=48 is not a multiple of 32, .*: use 32 or 64",
    "model.size=tinny": r"size='tinny' is not one of atto, .*; did you mean 'tiny'\?",
    "model.engine=cuda12": "engine='cuda12' is unknown: use .*'torch'.*",
    "model.depths=[1,1,1]": r"depths=\[1, 1, 1\] must be four numbers from 1, one per stage",
    "model.depths=5": "model.depths=5 must be a list.*",
    "model.dims=[8,a,32,64]": "an entry of model.dims='a' must be a whole number",
    "data.in_chans=2": "(data.)?in_chans=2, but 3 means and 3 deviations: .*",
    "model.in_chans=1": "model.in_chans=1 .*data.in_chans=3.*",
    "model.image_size=96": "model.image_size=96 .*data.image_size=64.*",
    "data.mean=0.5": "data.mean=0.5 must be a list.*",
    "data.std=[0,0,0]": r"(data.)?std=\[0, 0, 0\] must be positive",
    "augment.crop_scale=[1,0.2]": r"augment.crop_scale=\[1, 0.2\] must be two rising shares .*",
    "augment.crop_scale=[0.2,0.5,1]": r"augment.crop_scale=\[0.2, 0.5, 1\] must be two rising shares .*",
    "optim.betas=0.9": "optim.betas=0.9 must be a list.*",
    "optim.betas=[0.9,1]": r"optim.betas=\[0.9, 1\] must be two numbers in \[0, 1\).*",
    "optim.base_lr=-1.5": "optim.base_lr=-1.5 must be a number from 0",
    "seed=-1": "seed=-1 must be a whole number from 0.*",
    "seed=5000000000": "seed=5000000000 must be a whole number from 0 to 4294967295",
    "data.batch_size=0": "data.batch_size=0 must be at least 1",
    "data.batch_size=5000": "1765 training images are fewer than one .* of 5000: use data.batch_size=1765 .*",
    "effective_batch=100": "effective_batch=100 is not a multiple of 8 = data.batch_size=8 x 1 devices x 1 nodes: .*",
    "data.num_workers=many": "data.num_workers='many' must be a number from 0, or auto",
    "data.max_broken=2": r"data.max_broken=2 must be a share in \[0, 1\]",
    "trainer.strategy=foo": "lightning.Trainer refuses its options: .*'foo'.*",
    "trainer.max_epochs=-1": "trainer.max_epochs=-1 .*",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches=0 .*",
    "resume=maybe": "resume='maybe' is unknown: use auto or never",
    "save.keep=0": "save.keep=0 must be a whole number from 1",
    "+logger.csv.foo=1": "logger.csv.foo is not an option of CSVLogger",
    "run_name=''": "run_name='' .*",
    "masking._target_=fcmae.masking.Nothing": r"(model\.)?masking._target_=fcmae.masking.Nothing .*",
}


@pytest.mark.parametrize("argument", BAD_VALUES)
def test_a_value_out_of_its_bounds(argument, tmp_path):
    result = pretrain(tmp_path, *MICRO, argument)
    assert re.fullmatch(BAD_VALUES[argument], result.only_error), result.err
    assert not list(tmp_path.iterdir())


def test_an_effective_batch_that_the_images_cannot_fill_is_refused_with_a_fix_that_works(tmp_path):
    command = [*MICRO, "epochs=1", "trainer.limit_train_batches=null", "data.batch_size=32", "effective_batch=4096"]
    message = pretrain(tmp_path, *command).only_error
    found = re.fullmatch("1765 training images are fewer than .* of 4096: use (.*) or less, or more images", message)
    assert pretrain(tmp_path, *command, found.group(1)).code == 0


@pytest.mark.parametrize("accumulate", [3, 8])
def test_a_limited_epoch_of_unfinished_steps_still_ends_with_a_checkpoint_or_is_refused(accumulate, tmp_path):
    """Four micro-batches per epoch are no multiple of so many accumulated ones."""
    result = pretrain(tmp_path, *MICRO, f"effective_batch={8 * accumulate}")
    if result.code:
        assert "limit_train_batches" in result.only_error
        assert not list(tmp_path.iterdir())
    else:
        load_finite(tmp_path / RUN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "images does not exist: name a folder of images"),
        (lambda path: path.write_text("x"), "images is a file: name a folder of images"),
        (lambda path: path.mkdir(), "images holds no image: looked in all its folders for .bmp, .jpeg, .*"),
        (lambda path: (write_images(path / ".hidden", 3), (path / "a.txt").write_text("x")), ".* holds no image: .*"),
        (lambda path: write_images(path, 1), "1 image is too few to train on and to validate with: at least 2 .*"),
        (lambda path: write_images(path, 4), "3 training images are fewer than one effective batch of 4: .*"),
    ],
    ids=["missing", "file", "empty", "no images", "one image", "few images"],
)
def test_a_folder_without_enough_images(make, message, tmp_path):
    make(tmp_path / "images")
    before = content(tmp_path)
    assert re.fullmatch(message, pretrain(tmp_path, *FOLDER).only_error)
    assert content(tmp_path) == before
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_folder_that_cannot_be_read_or_written(tmp_path):
    write_images(tmp_path / "images" / "locked", 8)
    (tmp_path / "images" / "locked").chmod(0)
    try:
        assert re.match("cannot read the folder .*locked: Permission denied", pretrain(tmp_path, *FOLDER).only_error)
    finally:
        (tmp_path / "images" / "locked").chmod(0o700)
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in pretrain(tmp_path, *FOLDER, "run_dir=closed/run").only_error


def test_a_run_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    message = pretrain(tmp_path, *MICRO, "run_dir=file/run").only_error
    assert message == "cannot write the run folder file/run: Not a directory; name another with run_dir=..."
    assert content(tmp_path) == before


def test_a_folder_that_is_no_run_is_never_set_aside(tmp_path):
    file = write_images(tmp_path / "precious", 1)[0].relative_to(tmp_path)
    before = content(tmp_path)
    for run_dir in ("precious", ".", str(file)):
        assert run_dir in pretrain(tmp_path, *MICRO, f"run_dir={run_dir}", "resume=never").only_error
        assert content(tmp_path) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_image_is_skipped_and_named(workers, tmp_path):
    files = write_images(tmp_path / "images", 12)
    files[7].write_bytes(files[7].read_bytes()[:100])
    result = pretrain(tmp_path, *FOLDER, f"data.num_workers={workers}")
    assert result.code == 0, result.err
    skipped = [json.loads(line) for line in (tmp_path / RUN / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == ["007.png"]
    assert skipped[0]["reason"]
    log = (tmp_path / RUN / "train.log").read_text()
    assert log.count("skipped 007.png: ") == 1
    assert f"skipped 007.png: {skipped[0]['reason']}" in log


def test_too_many_broken_images_stop_the_run_and_mending_them_lets_it_go_on(tmp_path):
    files = write_images(tmp_path / "images", 22)
    train = [int(number) for number in _train_indices(len(files))]
    last = [position for _, position in EpochSampler(size=len(train), batch_size=4, seed=0)][-4:]
    broken = [files[train[position]] for position in last[:2]]  # read in the last of four steps of the first epoch
    whole = {file: file.read_bytes() for file in broken}
    for file in broken:
        file.write_text("no image")

    command = [*FOLDER, EVERY_STEP, "save.keep=9"]
    message = pretrain(tmp_path, *command).error
    list_of_them = RUN / "skipped.jsonl"
    assert message.startswith(f"2 of 22 images cannot be read (data.max_broken=0.01): see {list_of_them}, then mend")
    named = {json.loads(line)["id"] for line in (tmp_path / list_of_them).read_text().splitlines()}
    assert named == {file.name for file in broken}
    assert steps_saved(tmp_path) == [1, 2, 3]
    load_finite(tmp_path / RUN)

    for file, content_ in whole.items():
        file.write_bytes(content_)
    assert pretrain(tmp_path, *command).code == 0
    assert steps_saved(tmp_path) == [*range(1, 9)]


def _train_indices(count: int) -> list[int]:
    class Counted(ImageDataModule):
        def load_source(self) -> Any:
            return range(count)

    sizes = {"image_size": 64, "in_chans": 1, "batch_size": 1, "val_images": 32, "num_workers": 0, "max_broken": 0}
    sizes |= {"timeout": 600, "repeats": 1, "samples_per_epoch": None}
    return Counted(**sizes, mean=[0], std=[1], augment=Crop(crop_scale=[1, 1], flip=False), seed=0).split()[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_images_only(workers, tmp_path):
    for number in range(8):
        (tmp_path / f"images/{number}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.jpg").write_text("no image")
    message = pretrain(tmp_path, *FOLDER, f"data.num_workers={workers}").error
    assert re.fullmatch(r"\d images in a row cannot be read, the last one \d.jpg \(.*\): check the files, .*", message)


def test_a_changed_configuration_is_refused_and_the_ways_out_work(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before, changed = content(tmp_path), [*MICRO, "optim.base_lr=1e-3", "epochs=1"]
    message = pretrain(tmp_path, *changed).only_error
    assert message.startswith(f"{RUN} holds a run with another configuration (")
    for difference in ("epochs: 2 -> 1", "optim.base_lr: 0.004 -> 0.001"):
        assert difference in message
    assert "seed" not in message
    assert message.count("2 -> 1") == 1  # not trainer.max_epochs, too
    assert "run_name, or resume=never" in message
    assert content(tmp_path) == before

    assert pretrain(tmp_path, *changed, "run_name=other").code == 0
    assert {name: now for name, now in content(tmp_path).items() if "/other/" not in name} == before

    assert pretrain(tmp_path, *changed, "resume=never").code == 0
    kept, old = content(tmp_path / f"{RUN}.old1"), content(finished / RUN)
    assert {name: data for name, (data, _) in kept.items()} == {name: data for name, (data, _) in old.items()}
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["steps"] == 4


def test_a_finished_run_typed_again_says_so_and_changes_nothing(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = content(tmp_path)
    for free in ([], ["logger=csv", "data.num_workers=2", "pictures=3", f"run_dir={tmp_path / RUN}"]):
        result = pretrain(tmp_path, *MICRO, *free)
        assert result.code == 0
        assert "this run is finished: steps 8" in result.err
        assert "resume=never to start over" in result.err
        assert content(tmp_path) == before


class PoisonedTarget:
    """Makes the loss of one training step infinite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.step, self.steps, self.compute = step, 0, fcmae.Pixels.__call__
        monkeypatch.setattr(fcmae.Pixels, "__call__", lambda *arguments: self(*arguments))

    def __call__(self, pixels: fcmae.Pixels, images: torch.Tensor, patch_size: int) -> torch.Tensor:
        values = self.compute(pixels, images, patch_size)
        self.steps += torch.is_grad_enabled()  # not in validation
        return values * torch.inf if torch.is_grad_enabled() and self.steps == self.step else values


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        PoisonedTarget(patch, step=3)
        message = pretrain(tmp_path, *MICRO, EVERY_STEP).error
    assert re.match(r"the loss became (nan|inf) at step 3, in the batch of digits/\d+, .* and 4 more; ", message)
    train, step = _train_indices(1797), EpochSampler(size=1765, batch_size=8, seed=0)
    order = [train[position] for _, position in step][16:24]
    assert all(f"digits/{index}" in message for index in order[:4])
    assert steps_saved(tmp_path) == [1, 2]
    load_finite(tmp_path / RUN)
    assert pretrain(tmp_path, *MICRO, EVERY_STEP).code == 0  # the cause is gone


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """The gradient of the square root of 0 is infinite, so a step may ruin the weights although its loss was finite."""
    training_step = PretrainModule.training_step

    def ruinous(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        token = self.model.decoder.mask_token.sum()
        nothing = (token - token.detach()).abs().sqrt() if self.global_step == 1 else 0
        return training_step(self, batch, batch_idx) + nothing

    monkeypatch.setattr(PretrainModule, "training_step", ruinous)
    assert "step 2" in pretrain(tmp_path, *MICRO, EVERY_STEP).error
    assert steps_saved(tmp_path) == [1]
    load_finite(tmp_path / RUN)


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, monkeypatch):
    """The second checkpoint does not fit."""
    limits, export = resource.getrlimit(resource.RLIMIT_FSIZE), PretrainModule.export

    def fill_the_disk(*arguments: Any) -> None:
        export(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "export", fill_the_disk)
        try:
            message = pretrain(tmp_path, *MICRO, EVERY_STEP).error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"cannot write \S+step=00000002.ckpt: File too large; free space", message)
    assert steps_saved(tmp_path) == [1]
    files = list(content(tmp_path))
    assert not [name for name in files if name.endswith(".tmp")]
    load_finite(tmp_path / RUN)
    load_finite(tmp_path / RUN / "checkpoints" / "last.ckpt")
    assert pretrain(tmp_path, *MICRO, EVERY_STEP).code == 0
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["steps"] == 8


def test_a_full_disk_met_by_a_log(tmp_path, monkeypatch):
    """The operating system does not say which file a failed write was for; the message says at least where."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(JsonLinesLogger, "log_metrics", fail)
    message = pretrain(tmp_path, *MICRO, "trainer.log_every_n_steps=1").error
    assert re.match(f"cannot write .*{RUN}.*: No space left on device; free space", message)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.EROFS, "cannot write x.png: Read-only file system; free space or mend permissions there"),
        (errno.EACCES, "may not use x.png: Permission denied; mend its permissions"),
        (errno.EPERM, "may not use x.png: Operation not permitted; mend its permissions"),
    ],
)
def test_what_the_operating_system_refuses(code, told, tmp_path, monkeypatch):
    """Of a file that may be to be read, such as an image."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), "x.png")

    monkeypatch.setattr(JsonLinesLogger, "log_metrics", refuse)
    assert pretrain(tmp_path, *MICRO, "trainer.log_every_n_steps=1").error == told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_prints_no_traceback(tmp_path):
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "train.log").symlink_to("/dev/full")
    result = pretrain(tmp_path, *MICRO, "epochs=1")
    assert "Traceback" not in result.err
    assert result.code == 0 or "No space left" in result.error


class Code:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.fixture(scope="module")
def checkpoint(finished: Path) -> dict[str, Any]:
    return torch.load(finished / RUN / "checkpoints" / "last.ckpt", weights_only=True)


def changed(checkpoint: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A copy that says something else of its model."""
    description = {**checkpoint["fcmae"], "model": {**checkpoint["fcmae"]["model"], **model}}
    return {**checkpoint, "fcmae": description}


NO_CHECKPOINTS = {
    "missing": lambda file, _: None,
    "empty": lambda file, _: file.touch(),
    "text": lambda file, _: file.write_text("a text\nof two lines"),
    "truncated": lambda file, good: (torch.save(good, file), os.truncate(file, file.stat().st_size // 2)),
    "a tensor": lambda file, _: torch.save(torch.zeros(3), file),
    "another program's": lambda file, good: torch.save({"state_dict": good["state_dict"]}, file),
    "no description": lambda file, good: torch.save({**good, "fcmae": "0.1"}, file),
    "an empty description": lambda file, good: torch.save({**good, "fcmae": {}}, file),
    "of the future": lambda file, good: torch.save({**good, "fcmae": {**good["fcmae"], "format": 99}}, file),
    "no weights": lambda file, good: torch.save({**good, "state_dict": {}}, file),
    "no tensors": lambda file, good: torch.save({**good, "state_dict": dict.fromkeys(good["state_dict"], 1)}, file),
    "other shapes": lambda file, good: torch.save(changed(good, dims=[8, 16, 32, 48]), file),
    "other names": lambda file, good: torch.save(changed(good, depths=[1, 1, 2, 1]), file),
    "an unknown option": lambda file, good: torch.save(changed(good, attention=True), file),
    "a bad option": lambda file, good: torch.save(changed(good, depths="many"), file),
    "a foreign model": lambda file, good: torch.save(changed(good, _target_="os.system"), file),
    "a foreign masking": lambda file, good: torch.save(changed(good, masking={"_target_": "os.system"}), file),
    "a foreign target": lambda file, good: torch.save(changed(good, target={"_target_": "os.system"}), file),
    "a bad masking": lambda file, good: torch.save(
        changed(good, masking={"_target_": "fcmae.masking.RandomMask", "ratio": 0.5}), file
    ),
    "pickled code": lambda file, _: file.write_bytes(pickle.dumps(Code(file.with_name("executed")))),
    "saved code": lambda file, good: torch.save({**good, "state_dict": Code(file.with_name("executed"))}, file),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_load_refuses(kind, checkpoint, tmp_path):
    file = tmp_path / "x.ckpt"
    NO_CHECKPOINTS[kind](file, checkpoint)
    with pytest.raises(fcmae.UserError) as caught:
        fcmae.load(file)
    message = str(caught.value)
    assert str(file) in message
    assert message.isprintable(), "one line, and no control characters"
    assert "weights_only" not in message
    assert "only if you trust" not in message, "no advice to load it all the same"
    assert not (tmp_path / "executed").exists()


def test_load_refuses_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(fcmae.UserError, match="holds no checkpoint that can be read: give a run's folder"):
        fcmae.load(tmp_path)


def test_load_takes_a_masking_and_a_target_instead_of_foreign_ones(checkpoint, tmp_path):
    foreign = {"_target_": "somewhere.Else"}
    torch.save(changed(checkpoint, masking=foreign, target=foreign), tmp_path / "x.ckpt")
    masking, target = fcmae.RandomMask(mask_ratio=0.5), fcmae.Pixels(norm_pix_loss=False)
    model = fcmae.load(tmp_path / "x.ckpt", masking=masking, target=target)
    assert (model.masking, model.target) == (masking, target)


def test_a_truncated_checkpoint_is_passed_over_when_a_run_goes_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = max((tmp_path / RUN / "checkpoints").glob("epoch=*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / RUN / "checkpoints" / "last.ckpt").unlink()
    load_finite(tmp_path / RUN)
    (tmp_path / RUN / "summary.json").unlink()
    result = pretrain(tmp_path, *MICRO)
    assert result.code == 0
    assert "step=00000004.ckpt" in result.err
    load_finite(newest)  # written anew
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["steps"] == 8
