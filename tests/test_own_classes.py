"""Classes of one's own named on the command line: they are found, their mistakes are told, their runs can be used."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from micro import MICRO, RUN, command, pretrain, write_images

import fcmae
from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.load import _MASKINGS, _TARGETS
from fcmae.command_line.launch import config_folder

SOURCE = """
from torch import nn, optim
import fcmae
from fcmae.training.optimization import AdamW


class Mask(fcmae.RandomMask):
    def __init__(self, *, ratio, patch_size=32):
        super().__init__(mask_ratio=ratio, patch_size=patch_size)

    @classmethod
    def half(cls, patch_size=32):
        return cls(ratio=0.5, patch_size=patch_size)


class Broken(Mask):
    def __init__(self, *, mask_ratio, patch_size):
        self.ratio = mask_ratio.lower()


class NoMask(fcmae.RandomMask):
    def __init__(self, *, mask_ratio, patch_size):
        raise fcmae.UserError("mask_ratio is not for me")


class Lion(AdamW):
    def optimizer(self, model, lr, *, fused=True):
        return optim.SGD(self.groups(model), lr=lr)


class Normed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln = nn.BatchNorm2d(width)


class Decoder(nn.Module):
    # With names that the authors' sparse models have, whole numbers among its weights, and without a mask token.
    def __init__(self, *, width, values):
        super().__init__()
        self.layers = nn.ModuleList([Normed(width)])
        self.last = nn.Conv2d(width, values, 1)

    def forward(self, packed, mask, wanted):
        values = self.last(self.layers[0].ln(packed).mean((2, 3), keepdim=True))
        side = packed.shape[3]
        return values.expand(-1, -1, wanted.index.shape[1] * side, side)


def model(**options):
    made = fcmae.create_model(**options)
    made.decoder = Decoder(width=made.encoder.net.num_features, values=made.decoder.pred.out_channels)
    return made


number = 3
"""
WITHOUT_RATIO = "~masking.mask_ratio"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module `lab`, which is found as with `python -m`."""
    (tmp_path / "lab.py").write_text(SOURCE)
    (tmp_path / "lab_without_package.py").write_text("import nosuch_package\n")
    (tmp_path / "lab_with_mistake.py").write_text("class Mask:\n    ratio = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("lab"):
            del sys.modules[name]


# What is wrong with them


MISTAKES = {
    "a missing module": (["masking._target_=nosuch.Mask"], "No module named 'nosuch'"),
    "a missing module of a package": (["masking._target_=fcmae.nosuch.Mask"], "fcmae has no nosuch"),
    "a module that needs what is missing": (
        ["masking._target_=lab_without_package.Mask"],
        "No module named 'nosuch_package'",
    ),
    "a class with a mistake": (["masking._target_=lab.Mak"], "lab has no Mak; did you mean Mask?"),
    "a method with a mistake": (["masking._target_=lab.Mask.hlf"], "lab.Mask has no hlf; did you mean half?"),
    "no module": (["masking._target_=Mask"], "it is not of the form module.Class"),
    "no name": (["masking._target_=lab..Mask"], "it is not of the form module.Class"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_cannot_be_imported_says_why(what, lab):
    options, told = MISTAKES[what]
    path = options[0].partition("=")[2]
    message = pretrain(lab, *MICRO, *options).only_error
    assert message == f"masking._target_={path} cannot be imported: {told}"
    assert not (lab / "outputs").exists()


REFUSED = {
    "an option with a mistake": (
        ["masking._target_=lab.Mask", WITHOUT_RATIO, "+masking.rato=0.5"],
        "masking.rato is not an option of Mask; did you mean ratio?; ~masking.rato leaves it out",
    ),
    "an option of the class that was chosen before": (
        ["masking._target_=lab.Mask.half"],
        "masking.mask_ratio is not an option of half; ~masking.mask_ratio leaves it out",
    ),
    "a missing option": (
        ["masking._target_=lab.Mask", WITHOUT_RATIO],
        "lab.Mask refuses its options: Mask.__init__() missing 1 required keyword-only argument: 'ratio'",
    ),
    "a missing option of ours": (
        ["~optim.min_lr"],
        "fcmae.training.optimization.AdamW refuses its options: AdamW.__init__() missing 1 required keyword-only "
        "argument: 'min_lr'",
    ),
    "no class": (["masking._target_=lab.number"], "masking._target_=lab.number is no class or function: name one"),
    "what it refuses itself": (["masking._target_=lab.NoMask"], "mask_ratio is not for me"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_do_not_fit(what, lab):
    options, told = REFUSED[what]
    assert pretrain(lab, *MICRO, *options).only_error == told
    assert not (lab / "outputs").exists()


@pytest.mark.parametrize(
    ("target", "error"), [("lab.Broken", AttributeError), ("lab_with_mistake.Mask", ZeroDivisionError)]
)
def test_a_mistake_in_a_class_comes_with_its_traceback(target, error, lab):
    with pytest.raises(error) as caught:
        pretrain(lab, *MICRO, f"masking._target_={target}")
    assert Path(caught.traceback[-1].path).parent == lab


def test_a_method_and_a_function_of_c_can_be_named(lab):
    from omegaconf import OmegaConf

    from fcmae.command_line.config_check import check_config

    check_config(OmegaConf.create({"masking": {"_target_": "lab.Mask.half", "patch_size": 64}}), {"masking"})
    check_config(OmegaConf.create({"masking": {"_target_": "builtins.dict", "x": 1}}), {"masking"})


# How they are found


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ([], "refuses its options: Mask.__init__() missing"),
        pytest.param(["-I"], "cannot be imported: No module named 'lab'", marks=pytest.mark.slow),
    ],
)
def test_the_console_script_finds_what_python_m_finds(python, told, tmp_path):
    (tmp_path / "lab.py").write_text(SOURCE)
    script = tmp_path / "bin" / "fcmae"  # its folder is what Python puts first
    script.parent.mkdir()
    script.write_text("from fcmae.__main__ import main\nmain()\n")
    for words in ([str(script), "pretrain"], ["-m", "fcmae.pretrain"]):
        typed = [sys.executable, *python, *words, *MICRO, "masking._target_=lab.Mask", WITHOUT_RATIO]
        done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert told in done.stderr.splitlines()[-1], done.stderr
        assert done.returncode == 2


# What they have trained


def test_an_optimiser_of_ones_own_is_not_replaced(lab):
    assert pretrain(lab, *MICRO).code == 0
    options = [*MICRO, f"init={RUN}", "run_name=again", "optim._target_=lab.Lion"]
    message = pretrain(lab, *options, "warm_start.decoder_steps=2").error
    assert message == (
        "optim is lab.Lion, and with init only optim=adamw can train the decoder alone at first: use that, or "
        "warm_start.decoder_steps=0 warm_start.encoder_lr_factor=1"
    )
    assert "optim is lab.Lion" in pretrain(lab, *options, "warm_start.encoder_lr_factor=0.5").error
    assert not (lab / "outputs/pretrain/again").exists()
    assert pretrain(lab, *options).code == 0
    saved = read_checkpoint(lab / "outputs/pretrain/again/checkpoints/last.ckpt")["optimizer_states"][0]
    assert "nesterov" in saved["param_groups"][0]  # SGD


def test_a_decoder_of_ones_own_is_no_obstacle(lab):
    """The encoder is fine-tuned, exported and used; a run goes on from both, or from it with the usual decoder."""
    result = pretrain(lab, *MICRO, "model._target_=lab.model")
    assert result.code == 0, result.err
    write_images(lab / "images/a", 6)
    write_images(lab / "images/b", 6)
    encoder = read_checkpoint(lab / RUN / "checkpoints/last.ckpt")["state_dict"]
    trained = fcmae.load_trained(lab / RUN).net.state_dict()
    assert all(torch.equal(value, encoder[f"model.encoder.net.{name}"]) for name, value in trained.items())

    shared = [f"checkpoint={RUN}", "num_workers=0", "device=cpu"]
    assert command("embed", lab, *shared, "images=images", "out=features.npy").code == 0
    assert command("export", lab, f"checkpoint={RUN}", "to=timm", "out=timm").code == 0
    size = [option for option in MICRO[:3] if "decoder" not in option]
    data = ["data.path=images", "data.image_size=64", "data.num_workers=0", "data.batch_size=4", "epochs=1"]
    result = command("finetune", lab, *size, *data, f"checkpoint={RUN}", "trainer=cpu", "optim.warmup_epochs=0")
    assert result.code == 0, result.err

    again = pretrain(lab, *MICRO, "model._target_=lab.model", f"init={RUN}", "run_name=own")
    assert re.search(r"^decoder: 7 tensors$", again.err, flags=re.MULTILINE), again.err
    usual = pretrain(lab, *MICRO, f"init={RUN}", "run_name=usual")
    assert "decoder: new, the file's does not fit (it lacks blocks.0.conv_dw.bias)" in usual.err
    back = pretrain(lab, *MICRO, "model._target_=lab.model", "init=outputs/pretrain/usual", "run_name=back")
    assert "decoder: new, the file's does not fit (it lacks last.bias)" in back.err
    assert (again.code, usual.code, back.code) == (0, 0, 0)

    with pytest.raises(fcmae.UserError, match=r"did not make: fcmae\.load_trained gives its encoder"):
        fcmae.load(lab / RUN)


def test_every_masking_and_target_of_the_configs_is_one_that_load_builds():
    for group, built in (("masking", _MASKINGS), ("target", _TARGETS)):
        files = list((config_folder() / group).glob("*.yaml"))
        assert files
        for file in files:
            name = re.findall(r"^_target_: (\S+)$", file.read_text(), flags=re.MULTILINE)
            assert name == [f"{built[name[0]].__module__}.{built[name[0]].__qualname__}"], file
