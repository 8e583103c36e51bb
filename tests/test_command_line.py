"""What one types: both spellings of a choice, help, several runs at once, and mistakes answered in one line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO, RUN, SMOKE, Result, command, content, pretrain, typed
from omegaconf import OmegaConf

import fcmae
from fcmae.__main__ import VERBS, main
from fcmae.command_line.launch import compose, config_folder, normalize
from fcmae.command_line.option_hints import choosable, defaults_of
from fcmae.errors import UserError
from fcmae.models.convnext import SIZES

CONFIGS = config_folder()
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
TAKEN = {verb: choosable(CONFIGS / f"{verb}.yaml") for verb in VERBS}


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
            st.builds(
                "{}{}={}".format,
                st.sampled_from(["", "+"]),
                st.sampled_from(sorted(TAKEN["pretrain"])),
                st.text(max_size=6),
            ),
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


@pytest.mark.parametrize(
    ("verb", "place", "more"),
    [
        ("pretrain", "run_dir", ["+model=tiny"]),
        ("pretrain", "init", ["+model=tiny"]),
        ("pretrain", "probe.data", ["+model=tiny"]),
        ("pretrain", "data.path", ["+model=tiny", "data=folder"]),
        ("pretrain", "data.cache_dir", ["+model=tiny", "data=webdataset", "data.path=x"]),
        ("finetune", "checkpoint", ["+model=tiny", "data.path=x"]),
        ("evaluate", "out", ["checkpoint=x", "data.path=x"]),
        ("predict", "images", ["checkpoint=x", "out=x"]),
        ("embed", "out", ["checkpoint=x", "images=x"]),
        ("shard", "out", ["data=folder", "data.path=x"]),
        ("export", "out", ["checkpoint=x", "to=timm"]),
        ("consolidate", "out", ["checkpoint=x"]),
        ("bench", "json", ["+model=tiny"]),
        ("bench", "plot", ["+model=tiny"]),
    ],
)
def test_a_tilde_is_the_home_folder_wherever_a_place_is_named(verb, place, more, tmp_path, monkeypatch):
    """Shells leave it as it is in `data.path=~/x`."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HOME", str(tmp_path))

    def composed(value: str) -> Any:
        return OmegaConf.select(compose(verb, [*more, f"{place}={value}"]), place)

    assert composed("~/x") == composed('"~/x"') == str(tmp_path / "x")
    assert composed("a~/x") == "a~/x"
    with pytest.raises(UserError, match="~nobody-is-called-so/x: nobody knows that home folder; write it out"):
        composed("~nobody-is-called-so/x")
    if place == "data.path":
        assert composed('["~/x",y]') == [str(tmp_path / "x"), "y"]


def test_the_groups_of_each_verb():
    assert TAKEN["pretrain"] == {
        *("augment", "data", "experiment", "logger", "masking", "model", "optim", "target", "trainer"),
    }
    assert TAKEN["finetune"] == TAKEN["pretrain"] - {"masking", "target"} | {"batch_augment"}
    assert TAKEN["bench"] == {"augment", "data", "masking", "model", "target"}
    assert TAKEN["evaluate"] == TAKEN["shard"] == {"data"}
    assert not any(TAKEN[verb] for verb in ("predict", "embed", "export", "consolidate"))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("plus", ["", "+"])
def test_a_group_that_is_not_the_verbs_is_refused(verb, group, plus):
    choice = f"{plus}{group}=one,two"
    if group in TAKEN[verb]:
        assert len(normalize([choice], verb, CONFIGS)) == 1
        return
    with pytest.raises(UserError, match=rf"{group}(=one,two)? (is not|cannot be) .*"):
        normalize([choice], verb, CONFIGS)


@pytest.mark.parametrize(
    ("verb", "choice", "message"),
    [
        ("evaluate", "trainer=cpu", "trainer=cpu is not for fcmae.evaluate: device=cpu takes the CPU"),
        ("bench", "trainer=gpu", "trainer=gpu is not for fcmae.bench: device=cuda takes a GPU"),
        ("predict", "+trainer=cpu", "+trainer=cpu is not for fcmae.predict: device=cpu takes the CPU"),
        ("shard", "trainer=cpu", "trainer is not a group of fcmae.shard, which has data"),
        ("evaluate", "logger=csv", "logger is not a group of fcmae.evaluate, which has data"),
        (
            "bench",
            "logger=csv",
            "logger is not a group of fcmae.bench, which has augment, data, masking, model, target",
        ),
        ("predict", "data=folder", "data is not a group of fcmae.predict, which has none: --help lists its options"),
        ("evaluate", "experiment=smoke", "experiment is not a group of fcmae.evaluate, which has data"),
        (
            "finetune",
            "demonstration=pretrain_digits",
            "demonstration=pretrain_digits cannot be chosen, it follows from data: leave it out",
        ),
    ],
)
def test_a_choice_for_another_verb_is_told_in_one_line(verb, choice, message, tmp_path):
    assert command(verb, tmp_path, choice).only_error == message
    assert not list(tmp_path.iterdir())


def test_what_is_hydras_own_is_left_as_it_is():
    typed_so = ["-m", "hydra/launcher=basic", "trainer@data.x=cpu", "~trainer", "hydra.job.name=x", "+data=folder,hf"]
    assert normalize(typed_so, "evaluate", CONFIGS) == [*typed_so[:-1], "data=folder,hf"]


def test_groups_of_the_users_own_are_taken(tmp_path):
    own, here = tmp_path / "own", tmp_path / "here"
    for name, text in (
        ("experiment/mine", "# @package _global_\nsplit: all\n"),
        ("lab/large", "# @package data\nbatch_size: 3 # as the lab likes it\n"),
        ("data/scans", "# Scans of the lab.\ndefaults: [imagefolder]\nin_chans: 1 # grey\npath: scans\n"),
    ):
        (own / name).parent.mkdir(parents=True)
        (own / f"{name}.yaml").write_text(text)
    here.mkdir()
    choices = ["+experiment=mine", "+lab=large", "data=scans", "checkpoint=x"]
    for place in (["--config-dir", str(own)], [f"hydra.searchpath=[{own}]"]):
        result = command("evaluate", here, *place, *choices, "--cfg", "job")
        assert (result.code, result.err) == (0, "")
        config = yaml.safe_load(result.out)
        assert (config["split"], config["data"]["batch_size"], config["data"]["in_chans"]) == ("all", 3, 1)

        result = command("evaluate", here, *place, *choices, "--help")
        assert (result.code, result.err) == (0, "")
        lines = result.out.splitlines()
        for line in ("experiment: mine", "lab: large", f"data: {SOURCES.replace('table', 'scans, table')}"):
            assert line in lines
        for line in ("split: all # default val: val, train or all", "data: # scans: Scans of the lab."):
            assert line in lines
        assert "  in_chans: 1 # grey" in lines
        assert not list(here.iterdir())

        assert command("evaluate", here, *place, "trainer=cpu").only_error.endswith("device=cpu takes the CPU")


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


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_the_comments_of_the_yaml_files(verb, tmp_path):
    result = command(verb, tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    assert not list(tmp_path.iterdir())
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 120
    told = " ".join(line.strip("# ") for line in lines)
    for comment in comments((CONFIGS / f"{verb}.yaml").read_text()):
        assert comment in told
    defaults = [
        pair for entry in defaults_of(CONFIGS / f"{verb}.yaml") if isinstance(entry, dict) for pair in entry.items()
    ]
    for file in [CONFIGS / f"{group}/{choice}.yaml" for group, choice in defaults if group in TAKEN[verb] and choice]:
        text = file.read_text()
        for comment in [text.splitlines()[0], *comments(text)]:
            assert comment.strip("# ") in told

    before_options = lines[: lines.index("== Options (change them as key=value) ==")]
    groups = {line.partition(":")[0] for line in before_options if re.match(r"\w+: ", line)}
    assert groups == TAKEN[verb]
    assert not [line for line in lines if "_digits" in line or line.startswith("demonstration")]
    assert ("finetune_" in result.out) == (verb == "finetune")


def comments(text: str) -> list[str]:
    """Those behind the keys of a YAML file, without what is Hydra's or follows."""
    lines = text.partition("\nhydra:")[0].splitlines()
    return [
        line.partition(" # ")[2] for line in lines if " # " in line and not re.match(" *- (override|optional)", line)
    ]


def test_help_has_the_values_in_force(tmp_path):
    lines = pretrain(tmp_path, "+model=tiny", "data=folder", "epochs=5", "-m", "--help").out.splitlines()
    assert "epochs: 5 # default 800: paper table 8; 1600 for its best results" in lines
    assert (
        "data: # folder: Images of your own: data=folder data.path=DIR. Every picture below DIR, no labels needed."
        in lines
    )
    assert "  path: ??? # a folder, an image, a list of images (.txt, .csv, .parquet), or several: [A,B]" in lines
    assert "  depths: [3, 3, 9, 3]" in lines

    lines = command("finetune", tmp_path, "trainer=ddp", "data=digits", "--help").out.splitlines()
    assert "trainer: # ddp: Data parallel over all GPUs of this machine, or so many: trainer.devices=4." in lines
    assert "  precision: auto # bf16-mixed where the device computes it natively, else 32-true" in lines  # auto's
    assert "  devices: -1" in lines
    assert "  warmup_epochs: 1 # default 40" in lines

    lines = command("bench", tmp_path, "--help").out.splitlines()
    above = lines[lines.index("what: step") - 2 : lines.index("what: step")]
    assert above[0].startswith("# step: the model alone; loader: the images alone;")
    assert above[1] == "# JPEGs costs, compared with torchvision"
    assert pretrain(tmp_path, "model=tinny", "--help").only_error.endswith("did you mean tiny?")
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
