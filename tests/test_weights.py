"""Weights of any origin come into timm's ConvNeXt, or one line says why they do not; nothing is unpickled."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_layers import imports
from timm.models._manipulate import adapt_input_conv
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn
from torch import Tensor, nn

import fcmae
from fcmae import UserError
from fcmae.checkpoints.export import export_network
from fcmae.checkpoints.format import FORMAT
from fcmae.checkpoints.layouts import layout
from fcmae.checkpoints.load_into import adapt_channels, load_into
from fcmae.checkpoints.names import Size, official_name, timm_name
from fcmae.checkpoints.weights import Weights, read_weights
from fcmae.models.convnext import SIZES

State = dict[str, Tensor]
DEPTHS, DIMS = (1, 1, 1, 1), (8, 16, 32, 64)
PRETRAINING = {"format": FORMAT, "model": {"depths": [1, 1, 1, 1]}}
CLASSIFICATION = {**PRETRAINING, "task": "classification"}
RECORDED = json.loads((Path(__file__).parent / "data" / "official_param_groups.json").read_text())  # the authors' names


def micro_net(num_classes: int = 5, **options: Any) -> ConvNeXt:
    options = {"depths": DEPTHS, "dims": DIMS, "use_grn": True, "ls_init_value": None} | options
    return ConvNeXt(num_classes=num_classes, **options).eval()


@pytest.fixture
def net(randomise: Callable[[nn.Module], nn.Module]) -> ConvNeXt:
    """With five classes, matrices in its MLPs, and no value that a fresh network has."""
    return randomise(micro_net())


def official(state: State) -> State:
    """In the authors' names and shapes: matrices in the MLPs, GRN with four axes."""
    renamed = {official_name(name): value for name, value in state.items()}
    for name, value in renamed.items():
        if "grn" in name:
            renamed[name] = value[None, None, None]
        elif "pwconv" in name:
            renamed[name] = value.flatten(1) if value.ndim == 4 else value
    return renamed


def scaled(state: State, factor: float) -> State:
    return {name: value * factor for name, value in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def saved(content: Any, file: Path, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, file)
    else:
        torch.save(content, file, **options)
    return file


def described(weights: State, description: dict[str, Any]) -> dict[str, Any]:
    return {"fcmae": description, "state_dict": weights, "epoch": 3}


def finetuned(net: ConvNeXt, *, average: bool = True) -> dict[str, Any]:
    """A fine-tuning checkpoint: the average is the network's weights, and the weights themselves are twice those."""
    state = net.state_dict()
    averages = prefixed("ema.module.", state) | {"ema.n_averaged": torch.tensor(7)} if average else {}
    return described(prefixed("net.", scaled(state, 2) if average else state) | averages, CLASSIFICATION)


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(call: Callable[[], Any]) -> str:
    """The one line of the UserError that it raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files of other makers: how each is written, and whose names it is found to have.
ARGUMENTS = argparse.Namespace(model="convnextv2_atto", lr=8e-4, betas=[0.9, 0.999], nested=argparse.Namespace(x=1))
TRAINING = {"args": ARGUMENTS, "epoch": 599, "optimizer": {"state": {0: {"step": 3}}}, "scaler": {}}
AUTHORS = "the authors' dense model"
FOREIGN: dict[str, tuple[Callable[[State], Any], str]] = {
    "net.safetensors": (lambda state: state, "timm"),
    "net.pth": (lambda state: state, "timm"),
    "pytorch_model.bin": (lambda state: state, "timm"),
    "compiled.pt": (lambda state: prefixed("_orig_mod.", state), "timm"),
    "distributed.pt": (lambda state: prefixed("module._orig_mod.", state), "timm"),
    "training.pth.tar": (lambda state: TRAINING | {"state_dict": state, "arch": "convnextv2_atto"}, "timm"),
    "dense.pt": (official, AUTHORS),
    "dense.safetensors": (official, AUTHORS),
    "released.pt": (lambda state: {"model": official(state)}, AUTHORS),
    "checkpoint-599.pth": (lambda state: TRAINING | {"model": prefixed("module.", official(state))}, AUTHORS),
    "no_average.pth": (lambda state: TRAINING | {"model": official(state), "model_ema": None}, AUTHORS),
    "best.pth": (
        lambda state: TRAINING | {"model": official(scaled(state, 2)), "model_ema": official(state)},
        AUTHORS,
    ),
    "only_average.pth": (lambda state: {"model_ema": official(state)}, AUTHORS),
    "lightning.ckpt": (lambda state: {"state_dict": state}, "timm"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others(name, net, tmp_path):
    write, kind = FOREIGN[name]
    file = saved(write(net.state_dict()), tmp_path / name)
    weights = read_weights(str(file))
    assert same(weights.weights, net.state_dict())
    assert (weights.file, weights.kind, weights.description) == (file, kind, None)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("write", [lambda state: state, official])
def test_the_older_format_of_torch(write, net, tmp_path):
    file = saved(write(net.state_dict()), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(file).weights, net.state_dict())


def test_our_pre_training_run_its_checkpoint_and_its_export(tmp_path, randomise):
    model = randomise(fcmae.create_model(depths=DEPTHS, dims=DIMS, decoder_dim=16))
    wanted = model.encoder.net.state_dict()
    content = described(prefixed("model.", model.state_dict()), PRETRAINING)
    older = saved(
        content | {"state_dict": scaled(content["state_dict"], 2)}, tmp_path / "checkpoints/epoch=1-step=9.ckpt"
    )
    newest = saved(content, tmp_path / "checkpoints" / "epoch=2-step=10.ckpt")
    export = tmp_path / "exported" / "encoder.safetensors"
    export_network(wanted, export, PRETRAINING)
    told = {
        tmp_path: (newest, "fcmae pre-training run"),
        newest: (newest, "fcmae checkpoint"),
        export: (export, "fcmae export"),
        export.parent: (export, "fcmae export"),
    }
    for path, (file, kind) in told.items():
        weights = read_weights(path)
        assert same(weights.weights, wanted)
        assert (weights.file, weights.kind, weights.description) == (file, kind, PRETRAINING)
        assert "holds no moving average" in refusal(lambda path=path: read_weights(path, ema=True))

    newest.write_bytes(newest.read_bytes()[:-1000])
    assert read_weights(tmp_path).file == older
    older.write_bytes(b"")
    assert "holds no checkpoint that can be read" in refusal(lambda: read_weights(tmp_path))


def test_our_fine_tuning_run_and_its_export(net, tmp_path):
    file = saved(finetuned(net), tmp_path / "checkpoints" / "last.ckpt")
    weights = read_weights(tmp_path)
    assert (weights.file, weights.kind, weights.description) == (file, "fcmae fine-tuning run", CLASSIFICATION)
    export = tmp_path / "exported" / "model.safetensors"
    export_network(net.state_dict(), export, CLASSIFICATION)
    weights = read_weights(export.parent)
    assert same(weights.weights, net.state_dict())
    assert (weights.file, weights.kind, weights.description) == (export, "fcmae export", CLASSIFICATION)


@pytest.mark.parametrize("config", [None, "{", "[1]", '{"architecture": "convnextv2_atto"}'])
def test_a_download_beside_a_configuration_of_its_own_is_timms(config, net, tmp_path):
    saved(net.state_dict(), tmp_path / "model.safetensors")
    if config:
        (tmp_path / "config.json").write_text(config)
    weights = read_weights(tmp_path)
    assert (weights.kind, weights.description) == ("timm", None)


AVERAGED = {
    "ours.ckpt": finetuned,
    "authors.pth": lambda net: {
        "model": official(scaled(net.state_dict(), 2)),
        "model_ema": official(net.state_dict()),
    },
    "timms.pth": lambda net: {"state_dict": scaled(net.state_dict(), 2), "state_dict_ema": net.state_dict()},
}


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize(("ema", "factor"), [(None, 1), (True, 1), (False, 2)])
def test_the_average_or_the_weights_themselves(name, ema, factor, net, tmp_path):
    file = saved(AVERAGED[name](net), tmp_path / name)
    assert same(read_weights(file, ema=ema).weights, scaled(net.state_dict(), factor))


def test_an_average_that_is_not_there_or_all_there_is(net, tmp_path):
    file = saved(finetuned(net, average=False), tmp_path / "last.ckpt")
    for ema in (None, False):
        assert same(read_weights(file, ema=ema).weights, net.state_dict())
    assert refusal(lambda: read_weights(file, ema=True)) == (
        f"{file} holds no moving average of the weights: read the weights themselves, ema=False"
    )
    file = saved({"model_ema": official(net.state_dict())}, tmp_path / "ema.pth")
    assert "holds the moving average of the weights alone" in refusal(lambda: read_weights(file, ema=False))


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


MALICIOUS: dict[str, Callable[[Touch, State, Path], Any]] = {
    "pickle.pth": lambda touch, state, file: file.write_bytes(pickle.dumps({"model": touch}, protocol=2)),
    "beside.pt": lambda touch, state, file: saved({"model": state, "extra": touch}, file),
    "arguments.pth": lambda touch, state, file: saved({"model": state, "args": argparse.Namespace(x=touch)}, file),
    "state.bin": lambda touch, state, file: saved(state | {"stem.0.weight": touch}, file),
    "ours.ckpt": lambda touch, state, file: saved(described(state, PRETRAINING) | {"loops": touch}, file),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_is_run(name, net, tmp_path):
    file, trace = tmp_path / name, tmp_path / "was here"
    MALICIOUS[name](Touch(trace), net.state_dict(), file)
    assert f"{file} holds more than tensors and plain data (it asks for posix.mkdir)" in refusal(
        lambda: read_weights(file)
    )
    assert not trace.exists()
    if file.name == "pickle.pth":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert trace.exists()  # it would have


def test_a_network_that_is_pickled_whole_is_refused(net, tmp_path):
    file = saved(net, tmp_path / "whole.pth")
    told = refusal(lambda: read_weights(file))
    assert told == (
        f"{file} holds more than tensors and plain data (it asks for timm.models.convnext.ConvNeXt): "
        "give a state dict alone"
    )


V1 = {"use_grn": False, "ls_init_value": 1e-6}
NO_STATE = "holds no state dict, names with a plain tensor each"
PART = r"holds only part of a ConvNeXt V2, custom \(depths \[1, 1, 0, 1\], dims \[8, 16, 0, 64\]\)"
UNREADABLE: dict[str, tuple[Callable[[State], Any], str]] = {
    "tensor.pth": (lambda state: torch.zeros(3), NO_STATE),
    "list.pth": (lambda state: [state], NO_STATE),
    "empty.pth": (lambda state: {}, NO_STATE),
    "optimizer.pth": (lambda state: {"optimizer": {}, "epoch": 3}, NO_STATE),
    "mixed.pth": (lambda state: state | {"epoch": 3}, NO_STATE),
    "numbered.pth": (lambda state: {"model": dict(enumerate(state.values()))}, NO_STATE),
    "no_weights.ckpt": (lambda state: {"fcmae": PRETRAINING, "state_dict": None}, NO_STATE),
    "no_encoder.ckpt": (lambda state: described(prefixed("net.", state), PRETRAINING), NO_STATE),
    "other_format.ckpt": (
        lambda state: described(state, {**PRETRAINING, "format": 99}),
        f"has format 99, this fcmae reads {FORMAT}",
    ),
    "resnet.pth": (
        lambda state: {"conv1.weight": torch.zeros(3)},
        "is no ConvNeXt V2 in the names of .*: its 1 weights begin with conv1.weight",
    ),
    "hugging_face.safetensors": (
        lambda state: prefixed("convnextv2.embeddings.", {"patch_embeddings.weight": torch.zeros(3)}),
        "holds only part of a ConvNeXt V2",
    ),
    "v1.pth": (lambda state: micro_net(**V1).state_dict(), "a ConvNeXt of the first version, with layer scale"),
    "v1_dense.pth": (
        lambda state: {
            "model": {n.replace("grn.gamma", "gamma"): v for n, v in official(state).items() if "beta" not in n}
        },
        "a ConvNeXt of the first version, with layer scale",
    ),
    "part.pth": (lambda state: {name: v for name, v in state.items() if not name.startswith("stages.2.")}, PART),
    "flat.pth": (lambda state: state | {"stem.0.weight": torch.zeros(8)}, "holds only part of a ConvNeXt V2"),
    "scalar.pth": (
        lambda state: state | {"stages.2.blocks.0.conv_dw.weight": torch.tensor(1.0)},
        "holds only part of a ConvNeXt V2, custom",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_convnext_v2(name, net, tmp_path):
    write, told = UNREADABLE[name]
    file = saved(write(net.state_dict()), tmp_path / name)
    with pytest.raises(UserError, match=told) as caught:
        read_weights(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "older.pth", "last.ckpt"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file(name, share, net, tmp_path):
    content = finetuned(net) if name == "last.ckpt" else net.state_dict()
    options = {"_use_new_zipfile_serialization": False} if name == "older.pth" else {}
    file = saved(content, tmp_path / name, **options)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "is truncated" in refusal(lambda: read_weights(file))


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors", "notes.ckpt"])
def test_a_file_of_something_else(name, tmp_path):
    (tmp_path / name).write_text("hello\n" * 100)
    assert str(tmp_path / name) in refusal(lambda: read_weights(tmp_path / name))


def test_nothing_there(tmp_path):
    assert "nowhere.pth does not exist: give a run's folder" in refusal(lambda: read_weights(tmp_path / "nowhere.pth"))
    assert "holds no checkpoint that can be read" in refusal(lambda: read_weights(tmp_path))


# Names and sizes


@pytest.mark.parametrize("size", RECORDED)
def test_names_are_mapped_as_timm_maps_them(size):
    with torch.device("meta"):
        net = timm.create_model(f"convnextv2_{size}")
        theirs = {name: torch.empty(1, 1) if "pwconv" in name else torch.empty(1) for name in RECORDED[size]["params"]}
    stand_in = argparse.Namespace(state_dict=lambda: {name: torch.empty(1, 1) for name in net.state_dict()})
    assert [timm_name(name) for name in theirs] == list(checkpoint_filter_fn(theirs, stand_in))
    assert [official_name(timm_name(name)) for name in theirs] == list(theirs)
    assert {timm_name(name) for name in theirs} == net.state_dict().keys()
    assert (layout(theirs), layout(net.state_dict())) == ("official", "timm")


@pytest.mark.parametrize("name", ["stages.0.0.grn", "stages.4.0.norm.weight", "downsample_layers.0.2.bias", "norm", ""])
def test_names_that_are_not_the_authors(name):
    assert timm_name(name) is None


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_known(size):
    with torch.device("meta"):
        net = timm.create_model(f"convnextv2_{size}", num_classes=0)
    found = Size.of(net.state_dict())
    assert (found.name, found.options) == (size, f"+model={size}")
    assert found.depths == tuple(len(stage.blocks) for stage in net.stages)
    assert found.dims == tuple(info["num_chs"] for info in net.feature_info)


# Into a network


@pytest.mark.parametrize("conv_mlp", [False, True], ids=["to matrices", "to convolutions"])
@pytest.mark.parametrize("write", [dict, official], ids=["timm", "official"])
@torch.no_grad()
def test_the_outputs_are_those_of_the_original(write, conv_mlp, randomise, tmp_path):
    images = torch.randn(2, 3, 64, 96)
    for original in (randomise(micro_net()), randomise(micro_net(conv_mlp=True))):
        loaded = micro_net(conv_mlp=conv_mlp)
        report = load_into(loaded, read_weights(saved(write(original.state_dict()), tmp_path / "net.pth")))
        assert (report.fresh, report.left_out, report.adapted) == ((), (), ())
        assert torch.allclose(loaded(images), original(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_published_size_in_either_naming(randomise, tmp_path):
    original = randomise(timm.create_model("convnextv2_atto", num_classes=10)).eval()
    file = saved({"model": official(original.state_dict())}, tmp_path / "released.pt")
    ours, theirs = (timm.create_model("convnextv2_atto", num_classes=10).eval() for _ in range(2))
    report = load_into(ours, read_weights(file))
    theirs.load_state_dict(checkpoint_filter_fn(official(original.state_dict()), theirs))
    assert same(ours.state_dict(), original.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    assert len(report.loaded) == len(original.state_dict())
    assert report.lines() == [
        f"encoder: 136 tensors from {file} (the authors' dense model)",
        "classifier: 10 classes, from the checkpoint",
    ]


def weights_of(net: ConvNeXt, **changes: Any) -> Weights:
    state = {name: value for name, value in (net.state_dict() | changes).items() if value is not None}
    return Weights(state, Path("weights.pth"), "timm", False, None)


HEADS: dict[str, tuple[int, int, bool, str]] = {
    "the same classes": (5, 5, True, "classifier: 5 classes, from the checkpoint"),
    "other classes": (5, 3, True, "classifier: new, 3 classes (the checkpoint's has 5)"),
    "not wanted": (5, 5, False, "classifier: new, 5 classes (the checkpoint's has 5)"),
    "none in the file": (0, 3, True, "classifier: new, 3 classes (the checkpoint has none)"),
    "none in the model": (5, 0, True, "classifier: none (the checkpoint's has 5)"),
    "none at all": (0, 0, True, "classifier: none (the checkpoint has none)"),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_classifier(case, randomise):
    theirs, ours, keep, told = HEADS[case]
    source, net = randomise(micro_net(theirs)), micro_net(ours)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load_into(net, weights_of(source), keep_head=keep)
    classifier = {"head.fc.weight", "head.fc.bias"}
    for name, value in net.state_dict().items():
        kept = name not in classifier or (keep and theirs == ours)
        assert torch.equal(value, source.state_dict()[name] if kept else before[name])
        assert (name in report.loaded, name in report.fresh) == (kept, not kept)
    loads_it = keep and theirs == ours > 0
    assert set(report.left_out) == (classifier if theirs and not loads_it else set())
    assert set(report.fresh) == (classifier if ours and not loads_it else set())
    assert report.lines() == ["encoder: 56 tensors from weights.pth (timm)", told]
    assert report.classes == (theirs, ours)


def test_a_file_without_final_norm_leaves_it_as_it_is(randomise):
    net, source = micro_net(), randomise(micro_net(0))
    report = load_into(net, weights_of(source, **{"head.norm.weight": None, "head.norm.bias": None}))
    assert torch.equal(net.head.norm.weight, torch.ones(64))
    assert report.lines()[1:] == ["final norm: new", "classifier: new, 5 classes (the checkpoint has none)"]
    assert set(report.fresh) == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}


def test_a_hidden_layer_of_the_head_counts_as_head(randomise):
    source, net = randomise(micro_net(head_hidden_size=24)), micro_net(head_hidden_size=16)
    report = load_into(net, weights_of(source))
    assert report.lines()[-1] == "classifier: new, 5 classes (the checkpoint's has 5)"
    assert {name for name in report.fresh if "pre_logits" in name} == {
        name for name in report.left_out if "pre_l" in name
    }
    assert load_into(micro_net(), weights_of(source)).left_out[-2:] == ("head.fc.weight", "head.fc.bias")


def test_another_size_is_refused_by_name():
    with torch.device("meta"):
        atto, tiny = (timm.create_model(f"convnextv2_{size}", num_classes=0) for size in ("atto", "tiny"))
    assert refusal(lambda: load_into(tiny, weights_of(atto))) == (
        "weights.pth holds a ConvNeXt V2 atto (depths [2, 2, 6, 2], dims [40, 80, 160, 320]), "
        "the model is tiny (depths [3, 3, 9, 3], dims [96, 192, 384, 768]): use +model=atto"
    )


@pytest.mark.parametrize("options", [{"depths": (1, 2, 1, 1)}, {"dims": (8, 16, 32, 48)}])
def test_another_depth_or_width_of_ones_own(options, net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    depths, dims = ([*values] for values in (options.get("depths", DEPTHS), options.get("dims", DIMS)))
    typed = f"model.depths={depths} model.dims={dims}".replace(", ", ",")
    assert refusal(lambda: load_into(net, weights_of(micro_net(**options)))) == (
        f"weights.pth holds a ConvNeXt V2 custom (depths {depths}, dims {dims}), "
        f"the model is custom (depths {[*DEPTHS]}, dims {[*DIMS]}): use +model=custom {typed}"
    )
    assert same(net.state_dict(), before)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too many": ({"norm_pre.weight": torch.ones(64)}, r"1 unknown \(first: norm_pre.weight\)"),
    "a layer too few": ({"stages.3.blocks.0.norm.bias": None}, r"1 missing \(first: stages.3.blocks.0.norm.bias\)"),
    "another kernel": (
        {"stages.0.blocks.0.conv_dw.weight": torch.zeros(8, 1, 5, 5)},
        r"1 of another shape \(first: stages.0.blocks.0.conv_dw.weight\)",
    ),
    "a transposed matrix": (
        {"stages.0.blocks.0.mlp.fc1.weight": torch.zeros(8, 32)},
        r"1 of another shape \(first: stages.0.blocks.0.mlp.fc1.weight\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit(case, net):
    changes, told = MISFITS[case]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match=rf"^weights.pth does not fit the model: of its weights {told}; give .*"):
        load_into(net, weights_of(micro_net(), **changes))
    assert same(net.state_dict(), before)


def test_networks_without_grn_go_together(net, randomise, tmp_path):
    without = randomise(micro_net(use_grn=False))
    weights = read_weights(saved(without.state_dict(), tmp_path / "net.pth"))
    assert not load_into(micro_net(use_grn=False), weights).fresh
    told = f"the model has GRN layers and {weights.file} has none: use model.use_grn=false"
    assert refusal(lambda: load_into(net, weights)) == told
    told = "weights.pth has GRN layers and the model has none: use model.use_grn=true"
    assert refusal(lambda: load_into(without, weights_of(net))) == told


# Channels


def test_another_number_of_channels_is_refused_unless_asked_for(net):
    grey = micro_net(in_chans=1)
    assert refusal(lambda: load_into(grey, weights_of(net))) == (
        "weights.pth is for images of 3 channels, the model takes 1: "
        "use data.in_chans=3, or adapt_in_chans=sum or repeat"
    )
    told = "adapt_in_chans='mean' is unknown: use sum or repeat, or null to refuse"
    for model in (grey, net):
        assert refusal(lambda model=model: load_into(model, weights_of(net), adapt_in_chans="mean")) == told
    assert not load_into(net, weights_of(micro_net()), adapt_in_chans="sum").adapted


@torch.no_grad()
def test_grey_images_give_what_grey_images_in_colours_gave(net):
    grey, images = micro_net(in_chans=1), torch.randn(2, 1, 64, 64)
    report = load_into(grey, weights_of(net), adapt_in_chans="sum")
    assert torch.allclose(grey(images), net(images.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)
    assert (report.adapted, report.in_chans) == (("stem.0.weight",), (3, 1))
    assert report.lines()[1] == "first convolution: adapted from 3 channels to 1"
    assert torch.equal(grey.stem[0].weight, adapt_input_conv(1, net.stem[0].weight))


@settings(max_examples=30)
@given(old=st.integers(1, 6), new=st.integers(1, 12), seed=st.integers(0, 1000))
def test_channels_that_are_alike_give_the_old_response(old, new, seed):
    numbers = torch.Generator().manual_seed(seed)
    kernel, image = (
        torch.randn(*shape, generator=numbers, dtype=torch.float64) for shape in ((4, old, 4, 4), (1, 1, 8, 8))
    )
    response = nn.functional.conv2d(image.repeat(1, old, 1, 1), kernel, stride=4)
    for how in ("sum", "repeat"):
        adapted = adapt_channels(kernel, new, how)
        assert adapted.shape == (4, new, 4, 4)
        if how == "sum" or new % old == 0:
            assert torch.allclose(nn.functional.conv2d(image.repeat(1, new, 1, 1), adapted, stride=4), response)
    alike = kernel[:, :1].repeat(1, old, 1, 1)
    assert torch.allclose(adapt_channels(alike, new, "repeat"), adapt_channels(alike, new, "sum"))


@pytest.mark.parametrize("channels", [2, 4, 6, 13])
def test_repeat_is_timms_way_with_colours(channels):
    kernel = torch.randn(8, 3, 4, 4)
    assert torch.allclose(adapt_channels(kernel, channels, "repeat"), adapt_input_conv(channels, kernel))
    assert torch.equal(adapt_channels(kernel, channels, "sum").var(1), torch.zeros(8, 4, 4))


def test_no_engine_is_imported():
    """Fine-tuning does without; engines take their time, and want what is not everywhere."""
    package = Path(fcmae.__file__).parent
    files, todo = set(), {package / "checkpoints" / "weights.py", package / "training" / "layer_decay.py"}
    while todo:
        files |= todo
        names = [
            name.split(".")[1:] for file in todo for name in imports(file.read_text()) if name.startswith("fcmae.")
        ]
        todo = {package.joinpath(*parts[:n]).with_suffix(".py") for parts in names for n in range(1, len(parts) + 1)}
        todo = {file for file in todo if file.is_file()} - files
    rooms = {file.relative_to(package).parts[0] for file in files}
    assert rooms == {"checkpoints", "training", "errors.py", "files.py"}
