"""Sharded training (FSDP2) on processes of the CPU: it computes what one device computes, and its checkpoints hold."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from micro import Result, command, write_images
from test_data import folder_data
from torch import Tensor

import fcmae
from fcmae.checkpoints.format import newest_checkpoint, read_checkpoint
from fcmae.checkpoints.sharded import REST, Rows, assemble

# Nine channels and a mask token of one row, which ranks cannot share evenly; nine images to validate with, two batches
# of the first of two ranks, and one of the other. Pre-training clips its gradients at every step; fine-tuning does not,
# and so has the fused AdamW.
MICRO = [
    *("+model=custom", "model.depths=[1,1,2,1]", "model.dims=[8,9,16,16]", "data.image_size=64", "data.num_workers=0"),
    *(
        "model.drop_path_rate=0.3",
        "effective_batch=16",
        "optim.warmup_epochs=1",
        "epochs=3",
        "trainer.log_every_n_steps=1",
    ),
    *("save.every_n_steps=2", "save.keep=9", "data.batch_size=4"),
]
PRETRAIN = [*MICRO, "model.decoder_dim=10", "data=folder", "data.val_images=9", "pictures=1", "optim.base_lr=0.01"]
PRETRAIN += ["trainer.gradient_clip_val=0.005"]
FINETUNE = [*MICRO, "checkpoint=null", "ema.decay=0.5", "optim.layer_decay=0.8", "model.head_init_scale=1"]
ONE = ["trainer=cpu"]
STEPS = 6


def ranks(count: int, trainer: str = "fsdp") -> list[str]:
    return [f"trainer={trainer}", "trainer.accelerator=cpu", f"trainer.devices={count}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, alone and with labels, and a run of each verb on one device."""
    place = tmp_path_factory.mktemp("fsdp")
    write_images(place / "images", 45)
    for part, counts in (("train", (16, 16)), ("val", (5, 4))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            write_images(place / "labelled" / part / name, count)
    here(place, "pretrain", "one")
    return place


def options(place: Path, verb: str, run: str) -> list[str]:
    data = place / ("images" if verb == "pretrain" else "labelled")
    return [*(PRETRAIN if verb == "pretrain" else FINETUNE), f"data.path={data}", f"run_dir={place / run}"]


def here(place: Path, verb: str, run: str, *more: str) -> Result:
    """Trains on one device, in this process."""
    result = command(verb, place, *options(place, verb, run), *ONE, *more)
    assert result.code == 0, result.err
    return result


def there(place: Path, verb: str, run: str, *more: str) -> None:
    """Trains in processes of its own."""
    typed = [sys.executable, "-m", f"fcmae.{verb}", *options(place, verb, run), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(typed, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def stopped(place: Path, run: str, copy: str, *, step: int) -> None:
    """A copy of a finished run as it was after some steps."""
    shutil.copytree(place / run, place / copy, symlinks=True)
    (place / copy / "summary.json").unlink()
    for path in (place / copy / "checkpoints").iterdir():
        if path.name in ("last.ckpt", "best.ckpt") or int(path.stem.rpartition("=")[2]) > step:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def last(run: Path) -> Path:
    newest = newest_checkpoint(run)
    assert newest is not None
    return newest


def tensors(run: Path) -> dict[str, Tensor]:
    checkpoint = assemble(read_checkpoint(last(run)))
    assert checkpoint["global_step"] == STEPS
    moments = checkpoint["optimizer_states"][0]["state"]
    flat = {f"{index}.{name}": value for index, entry in moments.items() for name, value in entry.items()}
    return {**checkpoint["state_dict"], **flat}


def logged(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"], line["grad_norm"]) for line in lines if "train_loss" in line]


def assert_same(run: Path, reference: Path, *, from_step: int = 0) -> None:
    """The same losses, gradients, weights, moments and validation, to rounding: sums are taken in another order."""
    assert len(logged(reference)) == STEPS
    for mine, its in zip(logged(run)[from_step:], logged(reference)[from_step:], strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    found, wanted = tensors(run), tensors(reference)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, reference)]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-4)


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """A run of two ranks, each with half of everything, which recomputes its blocks in the backward pass."""
    there(place, "pretrain", "two", *ranks(2), "model.grad_checkpointing=block")
    return place / "two"


def test_two_ranks_compute_what_one_device_does(place: Path, two: Path) -> None:
    assert all(norm > 0.005 for _, _, norm in logged(place / "one")), "nothing was clipped"
    assert_same(two, place / "one")
    exported = [run / "exported/encoder.safetensors" for run in (two, place / "one")]
    weights = [fcmae.load(file).state_dict() for file in exported]
    assert weights[0].keys() == weights[1].keys()
    assert (two / "images/latest.png").is_file()


def test_each_rank_keeps_and_writes_its_half(two: Path) -> None:
    files = sorted(path.name for path in last(two).iterdir())
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors", REST]
    sizes = [(last(two) / name).stat().st_size for name in files]
    assert sizes[0] < 1.2 * sizes[1]
    sharded = [value for value in read_checkpoint(last(two))["state_dict"].values() if isinstance(value, Rows)]
    assert len(sharded) == len(fcmae.load(two).state_dict())
    assert (two / "checkpoints/last.ckpt").resolve() == last(two)


def test_a_run_goes_on_on_one_device(place: Path, two: Path) -> None:
    stopped(place, "two", "two_then_one", step=2)
    here(place, "pretrain", "two_then_one", "model.grad_checkpointing=block")
    assert last(place / "two_then_one").is_file()
    assert_same(place / "two_then_one", place / "one", from_step=2)


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_on_two(place: Path) -> None:
    stopped(place, "one", "one_then_two", step=4)
    there(place, "pretrain", "one_then_two", *ranks(2))
    assert last(place / "one_then_two").is_dir()
    assert_same(place / "one_then_two", place / "one")


def test_consolidation(place: Path, two: Path) -> None:
    file = place / "two.ckpt"
    done = command("consolidate", place, f"checkpoint={two}", "out=two.ckpt")
    assert done.code == 0, done.err
    assert "after 6 steps, in one file of" in done.out
    one = torch.load(last(place / "one"), weights_only=True)
    assert torch.load(file, weights_only=True).keys() == one.keys()
    for read in (file, two, last(two), two / "checkpoints/last.ckpt"):
        weights = fcmae.load(read).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in fcmae.load(two).state_dict().items())
    here(place, "finetune", "tuned", f"checkpoint={two}", "epochs=1")
    lineage = read_checkpoint(last(place / "tuned"))["fcmae"]["lineage"]
    assert lineage[0]["source"].endswith(last(two).name)
    assert len(lineage[0]["sha256"]) == 64
    again = command("consolidate", place, f"checkpoint={two}", "out=two.ckpt").only_error
    assert again == "out=two.ckpt exists: name a new file"
    plain = command("consolidate", place, f"checkpoint={place / 'one'}", "out=x.ckpt").only_error
    assert plain == f"{last(place / 'one')} is one file already: it needs no consolidation"
    nothing = command("consolidate", place, "checkpoint=nothing", "out=x.ckpt").only_error
    assert nothing == "nothing does not exist: give a run's folder or a sharded checkpoint"


def test_one_device_is_refused(place: Path) -> None:
    result = command("pretrain", place, *options(place, "pretrain", "x"), *ranks(1))
    assert result.only_error.startswith("trainer=fsdp shards a model over several devices, and here is one: use")
    assert not (place / "x").exists()


@pytest.mark.slow
def test_fine_tuning_with_a_moving_average(place: Path) -> None:
    here(place, "finetune", "tuned_by_one")
    there(place, "finetune", "tuned_by_two", *ranks(2))
    assert any(name.startswith("ema.module.") for name in tensors(place / "tuned_by_two"))
    assert (place / "tuned_by_two/checkpoints/best.ckpt").is_file()
    assert_same(place / "tuned_by_two", place / "tuned_by_one")
    stopped(place, "tuned_by_two", "tuned_by_two_then_one", step=2)  # whose moments lie otherwise in memory
    here(place, "finetune", "tuned_by_two_then_one")
    assert_same(place / "tuned_by_two_then_one", place / "tuned_by_one", from_step=2)


@pytest.mark.parametrize(("held_out", "ranks", "batch"), [(9, 2, 4), (5, 2, 2), (7, 3, 2), (8, 4, 1), (3, 5, 2)])
def test_ranks_have_equally_many_batches_of_different_images(
    tmp_path: Path, held_out: int, ranks: int, batch: int
) -> None:
    """To validate with, even where there are fewer images than ranks; a repeated image counts for nothing."""
    write_images(tmp_path, 45)
    data = folder_data(tmp_path, val_images=held_out, batch_size=batch)
    lengths, counted = set(), []
    for rank in range(ranks):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, num_devices=ranks)  # type: ignore[assignment]
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        counted += [name for batch in batches if not batch.surplus for name in batch.sample_ids]
    assert len(lengths) == 1
    assert sorted(counted) == [f"{index:03d}.png" for index in data.split()[1]]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2, 0.5])
def test_part_of_a_validation(place: Path, limit: float) -> None:
    """Ranks take equally many batches of it, too."""
    for trainer in ("ddp", "fsdp"):
        run = f"{limit}_of_validation_{trainer}"
        there(place, "pretrain", run, *ranks(2, trainer), f"trainer.limit_val_batches={limit}", "epochs=1")
    losses = [
        json.loads((place / f"{limit}_of_validation_{trainer}/summary.json").read_text())["val_loss"]
        for trainer in ("ddp", "fsdp")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "count", "more"), [("ddp", 2, ""), ("ddp", 4, ""), ("fsdp", 4, "compile=true")])
def test_copies_compute_what_shares_do(place: Path, trainer: str, count: int, more: str) -> None:
    there(place, "pretrain", f"{count}_{trainer}", *ranks(count, trainer), *more.split())
    assert_same(place / f"{count}_{trainer}", place / "one")


@pytest.mark.slow
def test_two_ranks_go_on_as_four(place: Path, two: Path) -> None:
    stopped(place, "two", "two_then_four", step=4)
    there(place, "pretrain", "two_then_four", *ranks(4), "model.grad_checkpointing=block")
    assert_same(place / "two_then_four", two)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training_step", "validation_step"])
def test_a_signal_saves_all_ranks_rows(place: Path, moment: str) -> None:
    """One rank gets it among the batches of the fourth step, or in the validation after it."""
    script = place / f"signal_in_{moment}.py"
    script.write_text(
        f"""
import os, signal
from fcmae.command_line import launch
from fcmae.pretrain import pretrain
from fcmae.training.pretraining import PretrainModule

step = PretrainModule.{moment}

def signalled(self, batch, batch_idx):
    if self.global_rank == 1 and self.global_step == (3 if "train" in "{moment}" else 4):
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self, batch, batch_idx)

PretrainModule.{moment} = signalled
launch.run("pretrain", pretrain)
"""
    )
    run = place / moment
    typed = [sys.executable, script, *options(place, "pretrain", moment), *ranks(2), "save.every_n_steps=99"]
    done = subprocess.run(
        typed, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 75, done.stderr
    saved = read_checkpoint(last(run))["global_step"]
    assert saved == (3 if moment == "training_step" else 4)
    here(place, "pretrain", moment)
    assert_same(run, place / "one", from_step=saved)


@pytest.mark.slow
def test_in_mixed_precision_too(place: Path) -> None:
    for trainer in ("ddp", "fsdp"):
        there(place, "pretrain", f"mixed_{trainer}", *ranks(2, trainer), "trainer.precision=bf16-mixed")
    losses = [[loss for _, loss, _ in logged(place / f"mixed_{trainer}")] for trainer in ("fsdp", "ddp")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_probe_beside_it(place: Path) -> None:
    probe = ["probe.data=digits", "probe.every_n_epochs=1", "epochs=1"]
    here(place, "pretrain", "probed_by_one", *probe)
    there(place, "pretrain", "probed_by_two", *ranks(2), *probe)
    lines = [(place / run / "metrics.jsonl").read_text() for run in ("probed_by_one", "probed_by_two")]
    scores = [[json.loads(line)["val_knn_acc1"] for line in text.splitlines() if "knn" in line] for text in lines]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
    assert len(scores[0]) == 1
