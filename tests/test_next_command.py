"""The command that a pre-training ends with works as it is printed."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from micro import MICRO, command, pretrain

from fcmae.command_line.config_check import check_same_input
from fcmae.command_line.launch import compose
from fcmae.pretrain import _next_command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+model=tiny", "data=folder", "data.path=x"], "python -m fcmae.finetune +model=tiny checkpoint="),
        (["+model=atto", "data=folder", "data.path=x", "data.image_size=64"], "data.image_size=64"),
        (["+model=atto", "data=folder", "data.path=x", "data.image_size=[64,96]"], "'data.image_size=[64,96]'"),
        (
            ["+model=nano", "data.in_chans=1", "data.mean=auto", "data.std=auto", "data=folder", "data.path=x"],
            "chans=1",
        ),
        (
            ["+model=custom", "model.depths=[1,1,2,1]", "model.dims=[8,16,32,64]", "data=folder", "data.path=x"],
            "'model.depths=[1,1,2,1]' 'model.dims=[8,16,32,64]'",
        ),
        (
            ["+model=atto", "model.depths=[1,1,1,1]", "data=folder", "data.path=x"],
            "+model=custom 'model.depths=[1,1,1,1]' 'model.dims=[40,80,160,320]'",
        ),
        (["+model=atto", "model.use_grn=false", "data=folder", "data.path=x"], "+model=atto model.use_grn=false"),
    ],
)
def test_the_command_fine_tunes_the_same_network(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    before = compose("pretrain", arguments)
    command, run_dir = _next_command(before, eight_bits=True), before.run_dir
    assert said in command
    python, dash_m, module, *options = shlex.split(command)
    assert (python, dash_m, module) == ("python", "-m", "fcmae.finetune")
    after = compose("finetune", options)
    check_same_input(after)
    for name in ("depths", "dims", "use_grn"):
        assert before.model[name] == after.model[name]
    assert before.data.in_chans == after.data.in_chans
    assert before.data.image_size == after.data.image_size
    assert after.checkpoint == run_dir


@pytest.mark.parametrize(
    ("shape", "kind", "advised"),
    [
        ((40, 48), np.uint8, False),
        ((40, 48), np.uint16, True),
        ((40, 48, 3), np.uint16, True),
        ((40, 48, 4), np.uint8, True),
    ],
    ids=str,
)
def test_the_command_works_with_images_of_any_kind(
    shape: tuple[int, ...], kind: type, advised: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / f"images/{'ab'[number % 2]}/{number}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, random.integers(0, np.iinfo(kind).max, shape).astype(kind))
    measured = [f"data.in_chans={(*shape, 1)[2]}", "data.mean=auto", "data.std=auto"]
    result = pretrain(tmp_path, *MICRO, "data=folder", "data.path=images", *measured, "data.num_workers=0", "epochs=1")
    assert result.code == 0, result.err
    (line,) = re.findall("next: (.*)", result.out + result.err)
    assert ("augment.randaugment=null" in line) == advised
    options = shlex.split(line.replace("data.path=DIR", "data.path=images"))[3:]
    small = ["data.batch_size=8", "data.num_workers=0", "epochs=1", "optim.warmup_epochs=0", "trainer=cpu"]
    result = command("finetune", tmp_path, *options, *small)
    assert result.code == 0, result.err
