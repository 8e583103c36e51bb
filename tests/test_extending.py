"""The examples of docs/extending.md, taken from the page: masks, targets and decoders of one's own, in real runs."""

import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from micro import SMOKE, Result, command, pretrain
from torch import Tensor, nn

import fcmae
from fcmae.evaluation.trivial import trivial_losses
from fcmae.packing import pack

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
SOURCE = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))
COMMANDS = {
    re.findall(r"_target_=my\.(\w+)", line)[0]: shlex.split(line)[3:]
    for line in PAGE.splitlines()
    if line.startswith("python -m fcmae.pretrain ")
}
MICRO = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "decoder_dim": 16, "image_size": 96}


@pytest.fixture
def my(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "my.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)  # python -m has it from the folder that it is typed in
    monkeypatch.delitem(sys.modules, "my", raising=False)
    import my

    return my


def typed(name: str, folder: Path, *others: str) -> Result:
    """The page's command with `name`, on a model that trains in a second."""
    result = pretrain(folder, *COMMANDS[name], *SMOKE, "model.size=custom", f"run_name={name}", *others)
    assert result.code == 0, result.err
    metrics = [json.loads(line) for line in (folder / f"outputs/pretrain/{name}/metrics.jsonl").open()]
    losses = [line[key] for line in metrics for key in line if key.startswith("val_loss")]
    assert len(losses) >= 3
    assert all(math.isfinite(loss) for loss in losses)
    return result


def weights(name: str, folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / f"outputs/pretrain/{name}/checkpoints/last.ckpt")["state_dict"]
    return state


def test_there_is_a_command_for_each():
    assert list(COMMANDS) == ["BlockMask", "HOG", "Teacher", "with_linear_decoder"]


def test_a_run_with_a_mask_of_ones_own(my, tmp_path, monkeypatch):
    draw, drawn = my.BlockMask.__call__, []
    monkeypatch.setattr(my.BlockMask, "__call__", lambda *given: drawn.append((given, draw(*given))) or drawn[-1][1])
    typed("BlockMask", tmp_path, "data.image_size=96")
    assert len(drawn) >= 8  # steps
    for (_, images, seeds), mask in drawn:
        assert seeds.shape == images.shape[:1]
        assert mask.visible_patches == 2  # of 9, three quarters hidden


def test_a_block_is_seen_and_follows_from_the_seed(my):
    images, seeds = torch.zeros(50, 3, 160, 192), torch.arange(50)
    mask = my.BlockMask(mask_ratio=0.69)(images, seeds)
    mask.check(images, 32)
    assert mask.visible_patches == 9
    assert torch.equal(mask.index, fcmae.Mask(mask.visible).index)
    assert torch.equal(my.BlockMask(mask_ratio=0.69)(images[7:9], seeds[7:9]).visible, mask.visible[7:9])
    assert len(mask.visible.flatten(1).unique(dim=0)) > 10
    blocks = [{(int(row), int(column)) for row, column in visible.nonzero()} for visible in mask.visible]
    whole = [
        block for block in blocks if {(r - min(block)[0], c - min(block)[1]) for r, c in block} == set(np.ndindex(3, 3))
    ]
    assert len(whole) > 10  # all but those at the edge of an image


def test_a_run_with_histograms_as_target(my, tmp_path):
    result = typed("HOG", tmp_path, "pictures=2")
    assert weights("HOG", tmp_path)["model.decoder.pred.weight"].shape[0] == 4 * 4 * 9 * 3  # 32-pixel patch, 3 channels
    assert result.err.count("no pictures of reconstructions: the target, a HOG, has no to_pixels") == 1
    assert not list(tmp_path.rglob("*.png"))
    assert isinstance(fcmae.load(tmp_path / "outputs/pretrain/HOG", target=my.HOG()).target, my.HOG)


@pytest.mark.parametrize("patch_size", [32, 64])
def test_histograms_lie_where_the_prediction_has_them(patch_size, my):
    """A patch of 64 pixels has four outputs of the decoder, whose places become rows and columns of the patch."""
    model = fcmae.create_model(**MICRO | {"image_size": 192, "patch_size": patch_size}, target=my.HOG())
    images, side = torch.zeros(1, 3, 192, 192), patch_size // 8
    images[:, 1, 56:64, 8:16] = torch.arange(8.0)  # the cell of 8x8 pixels at (7, 1), channel 1, rising across
    patch, row = (0, 7) if patch_size == 64 else (6, 3)
    everything = fcmae.Mask.everything(1, 192 // patch_size, 192 // patch_size)
    values = my.HOG()(images, everything)
    assert values[0, patch].view(side, side, 3, 9)[row, 1, 1, 0] > 0.5

    cells = torch.zeros(1, 432, 6, 6)  # as the decoder gives it: 4x4 places of 27 values for every 32x32 pixels
    cells.view(1, 4, 4, 3, 9, 6, 6)[0, 3, 1, 1, 0, 1, 0] = 1
    pred = model._patches(pack(cells, everything))
    assert pred[0, patch].view(side, side, 3, 9)[row, 1, 1, 0] == 1
    assert pred.sum() == 1


def test_a_run_with_a_teacher(my, tmp_path):
    first = pretrain(tmp_path, "+model=custom", *SMOKE, "run_name=tiny-digits")
    assert first.code == 0, first.err
    typed("Teacher", tmp_path)
    state = weights("Teacher", tmp_path)
    assert state["model.decoder.pred.weight"].shape[0] == 64
    assert state.keys() == weights("tiny-digits", tmp_path).keys()  # without the teacher's


def test_a_teacher_sees_the_whole_image_in_training_and_in_validation(my, tmp_path, randomise):
    teacher = my.Teacher.__new__(my.Teacher)
    teacher.net = randomise(fcmae.create_model(**MICRO)).encoder.net.eval()
    model = fcmae.create_model(**MICRO, target=teacher)
    nn.init.zeros_(model.decoder.pred.weight)
    images = torch.randn(2, 3, 96, 96)
    loss, pred, mask = model(images)
    assert not pred.any()
    features = teacher.net.forward_features(images)
    expected = nn.functional.layer_norm(features.flatten(2).transpose(1, 2), (64,))  # (B, L, 64), of variance 1
    hidden = expected[~mask.visible.flatten(1)]
    torch.testing.assert_close(loss, hidden.square().mean(), rtol=0.05, atol=0)  # 64 / 63: an unbiased deviation
    exact = teacher(images, mask.hidden)
    torch.testing.assert_close(exact.flatten(0, 1), hidden, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(loss, exact.square().mean())
    torch.testing.assert_close(trivial_losses(teacher, images, mask, 32).mean, loss)  # each place's mean is zero


def test_a_run_with_a_decoder_of_ones_own(my, tmp_path):
    typed("with_linear_decoder", tmp_path)
    state = weights("with_linear_decoder", tmp_path)
    assert {name for name in state if name.startswith("model.decoder.")} == {
        f"model.decoder.{layer}.{kind}" for layer in ("spread", "pred") for kind in ("weight", "bias")
    }
    model = my.with_linear_decoder(**MICRO)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    model(torch.randn(2, 3, 96, 96)).loss.backward()
    assert all(block.conv_dw.weight.grad.any() for stage in model.encoder.net.stages for block in stage.blocks)


@pytest.mark.usefixtures("my")
def test_what_follows_reads_the_encoder_alone(tmp_path):
    typed("with_linear_decoder", tmp_path, "target._target_=my.HOG", "~target.norm_pix_loss")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        np.save(images / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    run: list[Any] = ["checkpoint=outputs/pretrain/with_linear_decoder", "num_workers=0", "device=cpu"]
    result = command("embed", tmp_path, *run, f"images={images}", "out=f.npy")
    assert result.code == 0, result.err
    assert np.load(tmp_path / "f.npy").shape == (2, 64)
