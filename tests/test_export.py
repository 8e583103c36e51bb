"""`python -m fcmae.export` as a command: what it writes, says and refuses; cards, licences, uploads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from micro import MODEL, Result, command, content
from safetensors.torch import load_file
from test_hub import hub  # noqa: F401  a fixture
from test_warm_start import encoder  # noqa: F401

import fcmae
from fcmae.checkpoints.lineage import sha256
from fcmae.checkpoints.weights import read_weights
from fcmae.conversion.formats import FORMATS
from fcmae.conversion.timm import Timm

PRETRAINED, FINETUNED = "outputs/pretrain/x", "outputs/finetune/x"
RUN = [*MODEL[:2], "data=digits", "data.image_size=64", "trainer.accelerator=cpu", "data.num_workers=0", "run_name=x"]
RUN += ["epochs=1", "trainer.limit_train_batches=2", "optim.warmup_epochs=0", "+model=custom"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-trained encoder and a classifier fine-tuned from it."""
    folder = tmp_path_factory.mktemp("runs")
    assert command("pretrain", folder, *RUN, MODEL[2], "pictures=0").code == 0
    result = command("finetune", folder, *RUN, f"init={PRETRAINED}", "save.keep=1", "ema.decay=0.9")
    assert result.code == 0, result
    return folder


def export(folder: Path, *arguments: str) -> Result:
    return command("export", folder, *arguments)


def front_matter(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return data


def untouched(folder: Path, result: Result, before: dict[str, Any]) -> str:
    """The one line of the error, after checking that nothing was left behind, hidden or not."""
    assert content(folder) == before
    return result.only_error


@pytest.mark.parametrize("checkpoint", [PRETRAINED, FINETUNED])
@pytest.mark.parametrize("to", FORMATS)
def test_every_direction_of_both_kinds(to, checkpoint, runs, tmp_path):
    out = tmp_path / "made" / "too"
    result = export(runs, f"checkpoint={checkpoint}", f"to={to}", f"out={out}", "license=mit")
    assert result.code == 0, result
    found = re.search(r"^loaded by (\w+) [\d.]+.*: largest difference (\S+), of values up to", result.out, re.MULTILINE)
    assert found, result.out
    assert 0 <= float(found[2]) < 1e-5
    assert "licence: mit" in result.out
    assert [file.name for file in tmp_path.rglob(".*")] == []
    told = json.loads((out / "fcmae.json").read_text())
    assert [entry["license"] for entry in told["lineage"]] == [None] * (1 + (checkpoint == FINETUNED))
    assert told["license"] == "mit"
    assert front_matter(out)["license"] == "mit"
    card = (out / "README.md").read_text()
    assert str(runs) not in card
    assert "| seed | 0 |" in card
    assert ("It tells one of 10 classes" in card) == (checkpoint == FINETUNED and to != "backbone")

    if to not in ("onnx", "torch"):  # what we read ourselves comes back bit for bit
        given, back = fcmae.load_trained(runs / checkpoint), fcmae.load_trained(out)
        theirs = back.net.state_dict()
        assert theirs.keys() == {n for n in given.net.state_dict() if to != "backbone" or not n.startswith("head.fc")}
        kept = [name for name in theirs if to != "backbone" or not name.startswith("head.")]
        assert all(torch.equal(given.net.state_dict()[name], theirs[name]) for name in kept)
        assert back.preparation == given.preparation
        assert back.class_names == (given.class_names if to != "backbone" else ())


def test_the_average_or_the_weights(runs, tmp_path):
    for ema in ("true", "false"):
        assert export(runs, f"checkpoint={FINETUNED}", "to=timm", f"out={tmp_path / ema}", f"ema={ema}").code == 0
        wanted = fcmae.load_trained(runs / FINETUNED / "checkpoints/last.ckpt", ema=ema == "true").net.state_dict()
        assert torch.equal(load_file(tmp_path / ema / "model.safetensors")["head.fc.weight"], wanted["head.fc.weight"])
    average, weights = ((tmp_path / ema / "model.safetensors").read_bytes() for ema in ("true", "false"))
    assert average != weights
    assert read_weights(tmp_path / "true").average
    assert not read_weights(tmp_path / "false").average


def test_another_image_size_is_noted(runs, tmp_path):
    result = export(runs, f"checkpoint={FINETUNED}", "to=timm", f"out={tmp_path / 'x'}", "image_size=[96,128]")
    assert "2 photographs of 96x128 px" in result.out
    assert fcmae.load_trained(tmp_path / "x").preparation.image_size == (96, 128)


def test_the_card_has_results_recipe_and_no_places(runs, tmp_path):
    export(runs, f"checkpoint={FINETUNED}/checkpoints/best.ckpt", "to=hf", f"out={tmp_path / 'best'}")
    card = (tmp_path / "best" / "README.md").read_text()
    assert re.search(r"\| val_(ema_)?acc1, at step 2, by which this checkpoint was chosen \| 0\.\d+ \|", card)
    export(runs, f"checkpoint={PRETRAINED}", "to=hf", f"out={tmp_path / 'last'}")
    card = (tmp_path / "last" / "README.md").read_text()
    assert re.search(r"\| val_loss \| [01]\.\d+ \|", card)
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert options["epochs"] == 1
    assert options["model"]["dims"] == [8, 16, 32, 64]
    assert "run_dir" not in options
    assert front_matter(tmp_path / "last") == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["convnextv2", "fcmae", "masked-autoencoder", "self-supervised-learning"],
    }
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert '"./last"' in usage


def test_an_export_can_be_given_to_every_verb_again(runs, tmp_path):
    assert export(runs, f"checkpoint={FINETUNED}", "to=hf", f"out={tmp_path / 'hf'}").code == 0
    assert export(runs, f"checkpoint={tmp_path / 'hf'}", "to=official", f"out={tmp_path / 'official'}").code == 0
    assert export(runs, f"checkpoint={tmp_path / 'official'}", "to=timm", f"out={tmp_path / 'timm'}").code == 0
    shutil.copy(Path(__file__).parents[1] / "docs/images/reconstructions.png", tmp_path / "image.png")
    tables = []
    for checkpoint in (runs / FINETUNED, tmp_path / "timm"):
        options = [f"checkpoint={checkpoint}", f"images={tmp_path / 'image.png'}", f"out={tmp_path / 'p.csv'}"]
        assert command("predict", tmp_path, *options, "num_workers=0", "device=cpu").code == 0
        tables.append((tmp_path / "p.csv").read_text())
    assert tables[0] == tables[1]
    lineage = json.loads((tmp_path / "timm/fcmae.json").read_text())["lineage"]
    assert [Path(entry["source"]).name for entry in lineage[2:]] == ["model.safetensors", "model.pth"]
    assert lineage[-1]["sha256"] == sha256(tmp_path / "official/model.pth")


# Licences


def test_what_comes_from_the_authors_weights_stays_under_their_licence(encoder, tmp_path):  # noqa: F811
    assert command("pretrain", tmp_path, *RUN, MODEL[2], "pictures=0", f"init={encoder}").code == 0
    assert command("finetune", tmp_path, *RUN, f"checkpoint={PRETRAINED}").code == 0
    asked = [f"checkpoint={FINETUNED}", "to=timm"]
    result = export(tmp_path, *asked, "out=a")
    assert "licence: cc-by-nc-4.0" in result.out
    card = (tmp_path / "a/README.md").read_text()
    assert front_matter(tmp_path / "a")["license"] == "cc-by-nc-4.0"
    assert f"| {encoder.name} | cc-by-nc-4.0 | `{sha256(encoder)[:16]}` |" in card

    before = content(tmp_path)
    told = untouched(tmp_path, export(tmp_path, *asked, "out=b", "license=apache-2.0"), before)
    assert told == (
        f"license=apache-2.0: these weights come from {encoder.name}, whose licence is cc-by-nc-4.0; leave license "
        "out, or, if you have the right to, add drop_license=true, which the export records"
    )
    assert "licence: apache-2.0" in export(tmp_path, *asked, "out=b", "license=apache-2.0", "drop_license=true").out
    card = (tmp_path / "b/README.md").read_text()
    assert "cc-by-nc-4.0 (dropped)" in card
    assert "has declared that the licences marked as dropped do not bind them" in card
    # What is made of an export has its history; and its licence, from then on.
    assert "licence: cc-by-nc-4.0" in export(tmp_path, "checkpoint=a", "to=hf", "out=c").out
    assert "licence: apache-2.0" in export(tmp_path, "checkpoint=b", "to=hf", "out=d").out
    assert "cc-by-nc-4.0 (dropped)" in (tmp_path / "d/README.md").read_text()


def test_a_copy_of_the_weights_alone_keeps_their_licence(encoder, tmp_path):  # noqa: F811
    """Renamed, in another folder, without what lay beside it."""
    assert command("pretrain", tmp_path, *RUN, MODEL[2], "pictures=0", f"init={encoder}").code == 0
    copies = [tmp_path / PRETRAINED / "exported" / "encoder.safetensors"]
    for to, names in {
        "timm": ["model.safetensors"],
        "hf": ["model.safetensors"],
        "official": ["model.pth", "finetune.pth"],
        "backbone": ["model.safetensors"],
    }.items():
        assert export(tmp_path, f"checkpoint={PRETRAINED}", f"to={to}", f"out={to}").code == 0
        copies += [tmp_path / to / name for name in names]
    for number, file in enumerate(copies):
        copy = tmp_path / f"copy{number}{file.suffix}"
        shutil.copy(file, copy)
        before = content(tmp_path)
        told = untouched(tmp_path, export(tmp_path, f"checkpoint={copy}", "to=timm", "out=x", "license=mit"), before)
        assert f"these weights come from {encoder.name}, whose licence is cc-by-nc-4.0" in told, file


# What is refused


BAD = {
    "no such direction": (["to=caffe", "out=x"], "to='caffe' is unknown: use timm or hf or onnx"),
    "no checkpoint": (["checkpoint=nothing", "to=timm", "out=x"], "nothing does not exist: give a run's folder"),
    "a place that is taken": (["to=timm", "out=outputs"], "out=outputs holds something already: name a new folder"),
    "a file": (["to=timm", f"out={FINETUNED}/train.log"], "holds something already"),
    "below a file": (
        ["to=timm", f"out={FINETUNED}/train.log/x"],
        "cannot be made, .*train.log is a file: name another folder",
    ),
    "a name that is none": (["to=timm", "out=x", "push=nobody"], "'?nobody'? is no .*user/name"),
    "a flag": (["to=timm", "out=x", "drop_license=maybe"], "drop_license='maybe' is unknown: use True or False"),
    "no licence": (["to=timm", "out=x", "license=[1]"], "license=.* is no name of a licence: write it as apache-2.0"),
    "nothing to drop": (["to=timm", "out=x", "drop_license=true"], "drop_license=true says nothing without license="),
    "where one is": (["to=timm", "out=."], "holds something already"),
    "what cannot be read back": (["checkpoint=onnx", "to=timm", "out=x"], "onnx is an export for other programs alone"),
    "an image size": (["to=timm", "out=x", "image_size=8"], "image_size=8 must be one side or two"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, runs):
    arguments, told = BAD[what]
    (runs / "onnx").mkdir(exist_ok=True)
    (runs / "onnx" / "fcmae.json").write_text("{}")
    before = content(runs)
    given = (
        arguments
        if any(word.startswith("checkpoint=") for word in arguments)
        else [f"checkpoint={FINETUNED}", *arguments]
    )
    assert re.search(told, untouched(runs, export(runs, *given), before))


def test_a_library_that_computes_something_else_leaves_nothing(runs, monkeypatch):
    right = Timm.outputs
    before = content(runs)
    for wrong in (lambda y: y + 1e-3, lambda y: y * float("nan"), lambda y: y[:, :3]):
        monkeypatch.setattr(Timm, "outputs", lambda self, *given, wrong=wrong: [wrong(y) for y in right(self, *given)])
        told = untouched(runs, export(runs, f"checkpoint={FINETUNED}", "to=timm", "out=not/yet/x"), before)
        assert not (runs / "not").exists()
        assert re.search(r"timm \S+ computes something else from what was written: largest difference", told)


def test_a_full_disk_leaves_nothing(runs, monkeypatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    before = content(runs)
    monkeypatch.setattr(os, "fsync", full)
    told = untouched(runs, export(runs, f"checkpoint={FINETUNED}", "to=timm", "out=x"), before)
    assert "No space left on device; free space" in told


def test_an_interrupt_leaves_nothing(runs, monkeypatch):
    def interrupted(self: Any, *given: Any) -> None:
        raise KeyboardInterrupt

    before = content(runs)
    monkeypatch.setattr(Timm, "outputs", interrupted)
    result = export(runs, f"checkpoint={FINETUNED}", "to=timm", "out=x")
    assert result.code == 130
    assert content(runs) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(signum, runs):
    before = content(runs)
    asked = [f"checkpoint={FINETUNED}", "to=onnx", "out=x"]
    process = subprocess.Popen([sys.executable, "-m", "fcmae.export", *asked], cwd=runs, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(runs.glob(".x.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(60) == 128 + signum
    assert content(runs) == before
    assert not list(runs.glob(".x.*"))


def test_the_place_is_a_link(runs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export(runs, f"checkpoint={FINETUNED}", "to=timm", f"out={tmp_path / 'link'}").code == 0
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


# Uploads


def test_an_export_is_pushed_and_read_again_by_its_name(hub, runs, tmp_path, monkeypatch):  # noqa: F811
    asked = [f"checkpoint={FINETUNED}", "to=hf", f"out={tmp_path / 'x'}", "push=ada/digits"]
    before = content(runs)
    assert "there is none" in untouched(runs, export(runs, *asked), before)
    assert not (tmp_path / "x").exists()

    hub.log_in("hf_ada", "ada")
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    result = export(runs, *asked)
    assert result.code == 0, result
    assert "uploaded: " in result.out
    pushed = hub.repos["ada/digits"]
    assert set(pushed.commits[pushed.head]) == {file.name for file in (tmp_path / "x").iterdir()}
    assert 'model="ada/digits"' in (tmp_path / "x/README.md").read_text()
    given, back = fcmae.load_trained(runs / FINETUNED), fcmae.load_trained("hf-hub:ada/digits")
    assert all(torch.equal(value, back.net.state_dict()[name]) for name, value in given.net.state_dict().items())
    assert back.class_names == given.class_names
    assert back.source.source == f"hf-hub:ada/digits@{pushed.head}"
