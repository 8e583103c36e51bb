"""Continued pre-training: any weights start it, a new decoder trains alone at first, and it resumes exactly."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO, RUN, pretrain
from test_weights import DEPTHS, DIMS, saved

import fcmae
from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.lineage import inherited_license, settle_license, sha256
from fcmae.checkpoints.names import to_official
from fcmae.checkpoints.recipe import recipe
from fcmae.errors import UserError
from fcmae.training.optimization import AdamW
from fcmae.training.warm_start import WarmStartAdamW

ADAMW = AdamW(base_lr=0.1, min_lr=0.01, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=1)


def warm(**options) -> WarmStartAdamW:
    return WarmStartAdamW.of(ADAMW, **{"decoder_steps": None, "encoder_lr_factor": 1.0, "new_decoder": True} | options)


def rates(optim: WarmStartAdamW, *, steps: int, steps_per_epoch: float) -> dict[bool, list[float]]:
    """The rate of every step, of the encoder (True) and the decoder (False)."""
    groups = optim.groups(fcmae.create_model(depths=DEPTHS, dims=DIMS, decoder_dim=16))
    factors = optim.factors(groups, peak=0.1, steps=steps, steps_per_epoch=steps_per_epoch)
    found = {}
    for group, factor in zip(groups, factors, strict=True):
        found[group["is_encoder"]] = [factor(step) * 0.1 * group["lr_scale"] for step in range(steps)]
    return found


@given(start=st.integers(0, 50), factor=st.floats(0, 2), warmup=st.integers(0, 20))
def test_the_decoder_trains_alone_then_the_encoder_joins(start, factor, warmup):
    found = rates(warm(decoder_steps=start, encoder_lr_factor=factor), steps=100, steps_per_epoch=warmup)
    plain = [ADAMW.lr_at(step, peak=0.1, steps=100, warmup_steps=warmup) for step in range(100)]
    later = [ADAMW.lr_at(step, peak=0.1, steps=100 - start, warmup_steps=warmup) for step in range(100 - start)]
    assert found[False] == pytest.approx(plain)
    assert found[True] == pytest.approx([0.0] * start + [factor * rate for rate in later])


@pytest.mark.parametrize(
    ("options", "start"),
    [({}, 5), ({"new_decoder": False}, 0), ({"new_decoder": False, "decoder_steps": 7}, 7), ({"decoder_steps": 0}, 0)],
)
def test_how_long_the_decoder_trains_alone_by_default(options, start):
    assert [rate > 0 for rate in rates(warm(**options), steps=100, steps_per_epoch=0)[True]].index(True) == start


def test_the_groups_are_those_of_training_from_scratch_split_in_two():
    model = fcmae.create_model(depths=DEPTHS, dims=DIMS, decoder_dim=16)
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    decays = {id(p): group["weight_decay"] for group in ADAMW.groups(model) for p in group["params"]}
    found = {}
    for group in warm(encoder_lr_factor=0.5).groups(model):
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["weight_decay"]
            assert group["is_encoder"] == (id(parameter) in encoder)
            assert group["lr_scale"] == (0.5 if id(parameter) in encoder else 1.0)
    assert found == decays


def test_a_warm_start_that_outlasts_the_run_is_refused():
    with pytest.raises(UserError, match=r"warm_start.decoder_steps=90, and the encoder's warm-up of 10 steps after it"):
        rates(warm(decoder_steps=90), steps=100, steps_per_epoch=10)


# As a command


@pytest.fixture
def encoder(tmp_path, randomise) -> Path:
    """As the authors release one."""
    model = randomise(fcmae.create_model(depths=DEPTHS, dims=[8, 16, 32, 64], decoder_dim=16))
    weights = {name: value * 0.1 for name, value in to_official(model.encoder.net.state_dict()).items()}
    released = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    return saved({"model": released}, tmp_path / "convnextv2_atto_1k_224_fcmae.pt")


def state(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def test_from_an_encoder_alone(encoder, tmp_path):
    """Eight steps: in the first four the decoder moves and the encoder does not; then both do. Stopped on the way."""
    options = [*MICRO, f"init={encoder}", "warm_start.decoder_steps=4", "save.every_n_steps=1", "save.keep=9"]
    result = pretrain(tmp_path, *options)
    assert result.code == 0, result
    for line in (
        f"encoder: 56 tensors from {encoder} (the authors' dense model)",
        "decoder: new, the file has none",
        "licence of convnextv2_atto_1k_224_fcmae.pt: cc-by-nc-4.0",
    ):
        assert line in result.err + result.out, line
    run = tmp_path / RUN
    given = torch.load(encoder, weights_only=True)["model"]["stages.0.0.pwconv1.weight"]
    steps = {}
    for file in sorted((run / "checkpoints").glob("epoch=*.ckpt")):
        weights = read_checkpoint(file)["state_dict"]
        steps[int(file.stem.rpartition("=")[2])] = (
            weights["model.encoder.net.stages.0.blocks.0.mlp.fc1.weight"],
            weights["model.decoder.pred.weight"],
        )
    for step in range(1, 5):
        assert torch.equal(steps[step][0], given)
    assert not torch.equal(steps[6][0], given)
    assert all(not torch.equal(steps[step][1], steps[step + 1][1]) for step in range(1, 8))

    description = read_checkpoint(run / "checkpoints" / "last.ckpt")["fcmae"]
    source = {"source": encoder.name, "sha256": sha256(encoder), "license": "cc-by-nc-4.0"}
    assert description["lineage"] == [source]
    exported = json.loads((run / "exported" / "fcmae.json").read_text())
    assert exported["lineage"] == [source]

    # Stopped after five steps, without the file that it started from, it goes on as if nothing had been.
    for file in (run / "checkpoints").glob("*.ckpt"):
        if file.name == "last.ckpt" or int(file.stem.rpartition("=")[2]) > 5:
            file.unlink()
    (run / "summary.json").unlink()
    final = steps[8]
    encoder.unlink()
    assert pretrain(tmp_path, *options).code == 0
    assert torch.equal(state(run)["model.encoder.net.stages.0.blocks.0.mlp.fc1.weight"], final[0])
    assert torch.equal(state(run)["model.decoder.pred.weight"], final[1])
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["fcmae"]["lineage"] == [source]


def test_from_a_run_of_ours_with_its_decoder(tmp_path):
    assert pretrain(tmp_path, *MICRO).code == 0
    first = tmp_path / RUN
    result = pretrain(tmp_path, *MICRO, f"init={first}", "run_name=again", "save.every_n_steps=1", "save.keep=9")
    assert result.code == 0, result
    assert re.search(r"^decoder: \d+ tensors$", result.err, flags=re.MULTILINE)
    second = tmp_path / "outputs/pretrain/again"
    begun = read_checkpoint(next((second / "checkpoints").glob("*step=00000001.ckpt")))["state_dict"]
    name = "model.encoder.net.stages.0.blocks.0.mlp.fc1.weight"
    assert 0 < (begun[name] - state(first)[name]).abs().max() < 0.02  # one step away, so both parts train at once
    lineage = read_checkpoint(second / "checkpoints" / "last.ckpt")["fcmae"]["lineage"]
    assert [entry["source"] for entry in lineage] == [
        f"smoke-custom/{(first / 'checkpoints').glob('e*').__next__().name}"
    ]
    assert inherited_license(lineage) is None


BAD = {
    "a file that is not there": (["init=nothing.pth"], "nothing.pth does not exist: give a run's folder"),
    "a name of timm's": (["init=convnextv2_atto.fcmae"], "or timm:convnextv2_atto.fcmae to download it"),
    "a name on the hub": (["init=facebook/convnextv2-tiny-1k-224"], "or hf-hub:facebook/convnextv2-tiny-1k-224 to"),
    "steps below zero": (["warm_start.decoder_steps=-1"], "warm_start.decoder_steps=-1 must be a whole number from 0"),
    "a factor below zero": (["init=FILE", "warm_start.encoder_lr_factor=-1"], "encoder_lr_factor=-1 must be a number"),
    "another size": (["init=FILE", "model.depths=[1,1,2,1]"], "use +model=custom model.depths=[1,1,1,1]"),
    "other channels": (["init=FILE", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"], "adapt_in_chans=sum"),
    "strict": (["init=FILE", "strict=perhaps"], "strict='perhaps' is unknown: use True or False"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, encoder, tmp_path):
    options, told = BAD[what]
    result = pretrain(tmp_path, *MICRO, *(option.replace("FILE", str(encoder)) for option in options))
    assert told in result.error
    assert not (tmp_path / "outputs").exists()


def test_a_new_decoder_is_known_to_be_new_after_a_stop(encoder, tmp_path):
    """The twentieth of the run that it trains alone by default is counted from the run's start."""
    options = [*MICRO, f"init={encoder}", "save.every_n_steps=1", "save.keep=99", "epochs=10", "optim.warmup_epochs=0"]
    assert pretrain(tmp_path, *options).code == 0
    run = tmp_path / RUN
    final = state(run)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["fcmae"]["new_decoder"]
    for file in (run / "checkpoints").glob("*.ckpt"):
        if file.name == "last.ckpt" or int(file.stem.rpartition("=")[2]) > 1:
            file.unlink()
    (run / "summary.json").unlink()
    assert pretrain(tmp_path, *options).code == 0
    assert all(torch.equal(value, final[name]) for name, value in state(run).items())


def test_a_folder_with_the_name_of_a_number_or_of_a_checkpoint(tmp_path):
    assert pretrain(tmp_path, *MICRO).code == 0
    file = next((tmp_path / RUN / "checkpoints").glob("epoch=*.ckpt"))  # Hydra wants = in quotes
    for init, name in ((file.relative_to(tmp_path), "a"), (2024, "b"), ("lauf ü", "c")):
        if not str(init).endswith(".ckpt"):
            (tmp_path / str(init)).symlink_to(tmp_path / RUN)
        result = pretrain(tmp_path, *MICRO, f"init={init}", f"run_name={name}")
        assert result.code == 0, result


def test_what_was_refused_can_be_typed_again_corrected(tmp_path):
    assert pretrain(tmp_path, *MICRO).code == 0
    again = [*MICRO, f"init={RUN}", "run_name=again"]
    assert "leave nothing of a run of 8 steps" in pretrain(tmp_path, *again, "warm_start.decoder_steps=100").error
    assert pretrain(tmp_path, *again).code == 0


def test_a_run_does_not_start_from_itself(tmp_path):
    assert pretrain(tmp_path, *MICRO).code == 0
    for init in (RUN, RUN / "checkpoints" / "last.ckpt"):
        result = pretrain(tmp_path, *MICRO, f"init={init}", "resume=never")
        assert f"init={init} is the run's own folder" in result.error
    assert (tmp_path / RUN / "summary.json").exists()


# Where weights come from


NC, FREE, OURS, UPPER = (
    {"source": name, "license": name, "sha256": "0"} for name in ("cc-by-nc-4.0", "mit", None, "CC-BY-NC-4.0")
)


@pytest.mark.parametrize(
    ("lineage", "bound"),
    [
        ([], None),
        ([OURS], None),
        ([FREE, OURS], "mit"),
        ([NC, FREE, OURS], "cc-by-nc-4.0"),
        ([FREE, NC], "cc-by-nc-4.0"),
    ],
)
def test_which_licence_binds(lineage, bound):
    assert inherited_license(lineage) == bound
    assert settle_license(lineage, wanted=None, drop=False) == (bound, lineage)
    assert settle_license(lineage, wanted=bound, drop=True) == (bound, lineage)


def test_a_licence_is_dropped_only_when_that_is_said_and_it_is_noted():
    lineage = [FREE, NC, OURS]
    with pytest.raises(UserError, match=r"license=mit: these weights come from cc-by-nc-4.0, whose licence is .*"):
        settle_license(lineage, wanted="mit", drop=False)
    license, noted = settle_license(lineage, wanted="mit", drop=True)
    assert license == "mit"
    assert noted == [FREE | {"license_dropped": True}, NC | {"license_dropped": True}, OURS]
    assert inherited_license(noted) is None
    assert lineage == [FREE, NC, OURS]


def test_a_recipe_tells_no_places():
    config = {
        "run_dir": "/home/someone/outputs",
        "logger": {"wandb": {"entity": "someone"}},
        "data": {"path": "/home/someone/pictures", "table": "~/labels.csv", "image_size": 224, "augment": None},
        "init": "../weights/net.pth",
        "optim": {"_target_": "fcmae.training.optimization.AdamW", "betas": (0.9, 0.95)},
    }
    assert recipe(config) == {
        "data": {"path": "pictures", "table": "labels.csv", "image_size": 224, "augment": None},
        "init": "net.pth",
        "optim": {"_target_": "fcmae.training.optimization.AdamW", "betas": [0.9, 0.95]},
    }
    texts = {
        "customers/acme/ward3": "ward3",
        "/data/acme/": "acme",
        r"C:\Users\someone\b.tar": "b.tar",
        "C:b.tar": "b.tar",
        "~someone": "~",
        "file:///home/someone/x": "x",
        "file:/home/someone/x": "x",
        "sftp://user:word@host/someone/x": "x",
        "/home/a,customers/b,c": "a,b,c",
        "/home/{acme,bravo}/a.tar": "a.tar",
        "simplecache::/home/someone/x": "simplecache,x",
        "pipe:curl -H key:word https://host/x | tar x": "pipe:",
        "/home/a.tar,pipe:cat /home/b,/home/c": "a.tar,pipe:",
        "https://user:word@host:80/a/{0..9}.tar?token=1": "https://host/a/{0..9}.tar",
        "https://user:wo,rd@host/a#b": "https://host/a",
        "https://user:wo/rd@host/a": "https://",
        "https://user:word@[::1/a": "https://,a",
        "https://host/a?key=1,2/word": "https://host/a",
        "s3://bucket/a.tar?x=1,https://user:word@host/b": "s3://bucket/a.tar,https://host/b",
        "/home/someone/x,hf-hub:user/name": "x,hf-hub:user/name",
        "hf-hub:/home/someone": "someone",
    }
    texts |= dict.fromkeys(
        ["s3://bucket/a.tar", "hf-hub:user/name", "hf-hub:user/name@main", "timm:convnextv2_tiny.fcmae"]
    )
    texts |= dict.fromkeys(["rand-m9-mstd0.5-inc1", "16-mixed", "auto", "a, b", "digits", ""])
    assert recipe({"shards": list(texts)}) == {
        "shards": [text if name is None else name for text, name in texts.items()]
    }
