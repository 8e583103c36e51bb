"""The demonstration learns. (What `make demo` runs; minutes on two cores.)"""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fcmae
from fcmae.command_line import launch
from fcmae.pretrain import pretrain


@pytest.mark.slow
def test_the_demonstration_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "+model=atto"])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        launch.run("pretrain", pretrain)
    finally:
        torch.set_num_threads(threads)

    run = tmp_path / "outputs" / "pretrain" / "atto-digits"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_loss"] < 0.45
    assert summary["val_loss"] < min(summary["val_loss_patch_mean"], summary["val_loss_nearest_patch"]) / 2
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val_losses = [line["val_loss"] for line in losses if "val_loss" in line]
    assert len(val_losses) == 10
    assert val_losses[-1] < 0.55 * val_losses[0]  # 0.3036 of 0.6005, that is 0.506

    assert Image.open(run / "images" / "latest.png").width > 4 * 96
    model = fcmae.load(run)
    assert sum(parameter.numel() for parameter in model.encoder.net.parameters()) == 3_387_400
