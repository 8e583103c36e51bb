"""The command that a pre-training ends with works as it is printed."""

import shlex
import sys

import pytest

from fcmae.config_check import check_same_input
from fcmae.launch import compose
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
    command, run_dir = _next_command(before), before.run_dir
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
