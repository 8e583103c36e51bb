"""What one types: both spellings of a choice, help, several runs at once, and mistakes answered in one line."""

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO, RUN, SMOKE, Result, content, pretrain, typed

import fcmae
from fcmae.__main__ import main
from fcmae.launch import config_folder, normalize
from fcmae.models.convnext import SIZES

GROUPS = sorted(path.name for path in config_folder().iterdir() if path.is_dir())


def config_of(folder: Path, *arguments: str) -> dict:
    """What `--cfg job` prints, which must say nothing else and write nothing."""
    result = pretrain(folder, *arguments, "--cfg", "job", "--resolve")
    assert (result.code, result.err) == (0, "")
    assert not list(folder.iterdir())
    return yaml.safe_load(result.out)


def fcmae_(folder: Path, *words: str) -> Result:
    """The console script `fcmae <words>`."""
    with typed(folder, "fcmae", *words) as (out, err), mock.patch.object(sys, "path", [*sys.path]):
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_a_model_with_and_without_plus(size, tmp_path):
    with_plus, without = (config_of(tmp_path, f"{plus}model={size}") for plus in ("+", ""))
    assert with_plus == without
    assert with_plus["model"]["size"] == size
    assert with_plus["run_dir"] == f"outputs/pretrain/{size}-digits"


@pytest.mark.parametrize("choice", ["experiment=fcmae", "data=folder", "trainer=cpu", "logger=wandb"])
def test_every_other_choice_with_and_without_plus(choice, tmp_path):
    others = ["+model=atto", *(["data.path=images"] if choice in ("experiment=fcmae", "data=folder") else [])]
    with_plus, without = (config_of(tmp_path, *others, f"{plus}{choice}") for plus in ("+", ""))
    assert with_plus == without
    assert without != config_of(tmp_path, "+model=atto")


def test_several_models_at_once(tmp_path):
    result = pretrain(tmp_path, "-m", "+model=atto,femto", *SMOKE, "epochs=1", "trainer.limit_train_batches=1")
    assert result.code == 0, result
    for size in ("atto", "femto"):
        folder = tmp_path / "outputs/pretrain" / f"smoke-{size}"
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["size"] == size
        assert (folder / "summary.json").is_file()
        assert fcmae.load(folder).encoder.net.num_features == 64


@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(["-m", "--help", "--cfg", "job", "data.path=x", "model.dims=[1,2]", "~model", "=", "+"]),
            st.builds("{}{}={}".format, st.sampled_from(["", "+"]), st.sampled_from(GROUPS), st.text(max_size=6)),
        )
    )
)
def test_normalize_is_idempotent(arguments):
    once = normalize(arguments, "pretrain", config_folder())
    assert normalize(once, "pretrain", config_folder()) == once
    assert len(once) == len(arguments)
    bare = [[argument.lstrip("+").replace('"', "") for argument in words] for words in (once, arguments)]
    assert bare[0] == bare[1]  # but for pluses and quotes


def test_normalize_gives_each_group_hydras_form():
    typed_so = ["model=tiny", "+data=folder", "+epochs=3", "model.depths=[1]", "+target=x", "seed=1"]
    wanted = ["+model=tiny", "data=folder", "+epochs=3", "model.depths=[1]", "target=x", "seed=1"]
    assert normalize(typed_so, "pretrain", config_folder()) == wanted
    sweep = normalize(["-m", "model=atto,tiny", "model.decoder_dim=16,32"], "pretrain", config_folder())
    assert sweep[:2] == ["-m", "+model=atto,tiny"]


SOURCES = "digits, folder, fractal, hf, imagefolder, table, webdataset"
NAMES = ", ".join(sorted([*SIZES, "custom"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"no model is chosen: add +model=NAME with one of {NAMES}"),
        (["model.dims=[1,2,3,4]"], f"no model is chosen: add +model=NAME with one of {NAMES}"),
        (["experiment=smoke"], f"no model is chosen: add +model=NAME with one of {NAMES}"),
        (["+model=tinny"], f"model=tinny is not one of {NAMES}; did you mean tiny?"),
        (["model=qqq"], f"model=qqq is not one of {NAMES}"),
        (
            ["+model=tiny", "data=foldr"],
            f"data=foldr is not one of {SOURCES}; did you mean folder?",
        ),
        (
            ["+model=tiny", "experiment=smok"],
            "experiment=smok is not one of fcmae, finetune_in1k_.*, smoke; did you mean smoke?",
        ),
        (["+model=tiny", "optim=sgd"], "optim=sgd is not one of adamw, finetune"),
        (["+model=tiny", "data=folder"], "data.path is not given: add data.path=VALUE"),
        (["+model=custom"], "model.depths is not given: add model.depths=VALUE"),
        (["+model=tiny", "epoch=3"], "epoch is not an option; did you mean epochs?"),
        (["+model=tiny", "lr=1"], "lr is not an option; did you mean optim.base_lr?"),
        (["+model=tiny", "optim.lr=1"], "optim.lr is not an option; did you mean optim.base_lr?"),
        (["+model=tiny", "batch_size=8"], "batch_size is not an option; did you mean data.batch_size?"),
        (["+model=tiny", "image_size=64"], "image_size is not an option; did you mean data.image_size?"),
        (
            ["+model=tiny", "data.path=x"],
            "data=digits has no path: choose data=folder, hf, imagefolder, table or webdataset",
        ),
        (["+model=tiny", "data=folder", "data.path="], "data.path= is empty: give a value; is a variable .* not set?"),
        (["+model=tiny", "model.size=atto"], "model.size=atto names a size without .*: choose it with +model=atto"),
        (["+model=tiny", "run_name=a/../../x"], "run_name=a/../../x leads elsewhere: .* or the folder, run_dir=DIR"),
        (
            ["+model=tiny", "experiment=finetune_in1k_tiny"],
            "experiment=finetune_in1k_tiny is a recipe of fcmae.finetune: choose one of fcmae.pretrain's, or use that",
        ),
        (
            ["--model", "convnextv2_atto", "--data_path", "x y", "--epochs=3", "--lr", "1", "seed=1"],
            "options are written key=value, here +model=atto data=imagefolder 'data.path=x y' epochs=3 seed=1; "
            "--lr: give optim.base_lr=, the rate per 256 images of a step",
        ),
        (["--verbose"], "options are written key=value \\(--help lists them\\); --verbose: is not known here"),
        (
            ["--run_name", "x", "--trainer=cpu", "--data.path", "y"],
            "options are .*, here run_name=x trainer=cpu data.path=y",
        ),
        (["+model=tiny", "data.imagesize=64"], "data.imagesize is not an option; did you mean data.image_size?"),
        (["+model=tiny", "xyzzy=1"], "xyzzy is not an option"),
        (["+model=tiny", "+epoch=3"], "epoch is not an option; did you mean epochs?"),
        (["+model=tiny", "+xyzzy=1"], "xyzzy is not an option"),
        (["+model=tiny", "+model.xyzzy=1"], "model.xyzzy is not an option of create_model"),
        (
            ["+model=tiny", "+optim.weight_decey=0"],
            "optim.weight_decey is not an option of AdamW; did you mean weight_decay?",
        ),
        (["+model=tiny", "+trainer.xyzzy=1"], "trainer.xyzzy is not an option of Trainer"),
        (["+model=tiny", "+trainer.profler=simple"], "trainer.profler is .* of Trainer; did you mean profiler?"),
        (["+model=tiny", "epochs=many"], "epochs='many' must be a whole number from 1"),
        (["+model=tiny", "epochs=0"], "epochs=0 must be a whole number from 1"),
        (["+model=tiny", "epochs=1.5"], "epochs=1.5 must be a whole number from 1"),
        (["+model=tiny", "data.batch_size=8.5"], "data.batch_size=8.5 must be a whole number"),
        (["+model=tiny", "augment.flip=3"], "augment.flip=3 must be true or false"),
        (["+model=tiny", "optim.base_lr=high"], "optim.base_lr='high' must be a number"),
        (["+model=tiny", "model.grn_scope=all"], "model.grn_scope='all' is unknown: use 'image' or 'batch'"),
        (["+model=tiny", "compile=maybe"], "compile='maybe' is unknown: use True or False"),
        (
            ["+model=tiny", "trainer.precision=bf17"],
            "trainer.precision='bf17' is unknown: use one of auto, 32-true, bf16-mixed, 16-mixed",
        ),
        (["+model=tiny", "epochs"], "Error parsing override 'epochs'.*"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, tmp_path):
    result = pretrain(tmp_path, *arguments)
    assert result.code == 2
    assert re.fullmatch(message.replace("?", r"\?").replace("+", r"\+"), result.only_error), result.err
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_a_plain_group_is_refused(tmp_path):
    message = pretrain(tmp_path, *MICRO, "+save.keeep=1").only_error
    assert message == "save.keeep is not an option; did you mean save.keep?"
    assert not list(tmp_path.iterdir())


def test_help_lists_the_choices(tmp_path):
    result = pretrain(tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    for line in (f"data: {SOURCES}", "optim: adamw, finetune", "trainer: auto, cpu, ddp, fsdp, gpu"):
        assert line in result.out.splitlines()
    assert f"{NAMES}" in result.out
    assert "base_lr: 0.004" in result.out
    assert not list(tmp_path.iterdir())


def test_cfg_job_prints_the_configuration(tmp_path):
    result = pretrain(tmp_path, "+model=tiny", "epochs=7", "--cfg", "job")
    assert (result.code, result.err) == (0, "")
    config = yaml.safe_load(result.out)
    assert config["epochs"] == 7
    assert config["model"]["depths"] == [3, 3, 9, 3]
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_console_script_runs_the_verb(tmp_path):
    result = fcmae_(tmp_path, "pretrain", *MICRO, "epochs=1", "trainer.limit_train_batches=1")
    assert result.code == 0, result
    assert (tmp_path / RUN / "summary.json").is_file()
    assert "finished after 1 steps" in result.err
    before = content(tmp_path / RUN / "checkpoints")

    result = fcmae_(tmp_path, "pretrain", "model=tinny")
    assert result.only_error.endswith("did you mean tiny?")
    assert content(tmp_path / RUN / "checkpoints") == before


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_console_script_helps(words, tmp_path):
    result = fcmae_(tmp_path, *words)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: fcmae VERB")
    assert "pretrain" in result.out


def test_the_console_script_knows_its_version(tmp_path):
    assert fcmae_(tmp_path, "--version") == (0, f"fcmae {fcmae.__version__}\n", "")


def test_an_unknown_verb(tmp_path):
    assert fcmae_(tmp_path, "pretrian").only_error.endswith("did you mean pretrain?")
    assert re.match("'dance' is not one of pretrain, .*", fcmae_(tmp_path, "dance", "+model=tiny").only_error)
    assert not list(tmp_path.iterdir())


def test_python_m_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fcmae.pretrain", "model=tinny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "did you mean tiny?" in Result(done.returncode, done.stdout, done.stderr).only_error
    assert not list(tmp_path.iterdir())
