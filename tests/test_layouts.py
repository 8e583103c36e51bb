"""State dicts of any make become the same network; those made to harm are refused."""

import argparse
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_goldens import build, on_grid
from test_weights import DEPTHS, DIMS, described, micro_net, official, prefixed, refusal, same, saved
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

import fcmae
from fcmae.checkpoints.format import DESCRIPTION, FORMAT
from fcmae.checkpoints.layouts import CREATE_MODEL, find_weights, layout
from fcmae.checkpoints.load_autoencoder import load_autoencoder
from fcmae.checkpoints.load_into import load_into
from fcmae.checkpoints.names import to_hf, to_official
from fcmae.checkpoints.weights import read_weights
from fcmae.models.fcmae import FCMAE

State = dict[str, Tensor]
MODEL = {"depths": DEPTHS, "dims": DIMS, "decoder_dim": 16}


@pytest.fixture
def net(randomise: Callable[[nn.Module], nn.Module]) -> ConvNeXt:
    return randomise(micro_net())


@pytest.fixture
def model(randomise: Callable[[nn.Module], nn.Module]) -> FCMAE:
    return randomise(fcmae.create_model(**MODEL))


# transformers


@pytest.mark.parametrize("kind", ["ConvNextV2ForImageClassification", "ConvNextV2Model", "ConvNextV2Backbone"])
def test_what_transformers_writes(kind, randomise, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=5)
    theirs = randomise(getattr(transformers, kind)(config)).eval()
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert (weights.kind, weights.layout) == ("transformers", "hf")
    ours = micro_net(5 if kind.endswith("Classification") else 0)
    load_into(ours, weights)
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        if kind.endswith("Classification"):
            assert (ours(images) - theirs(images).logits).abs().max() < 1e-5
        elif kind.endswith("Model"):
            assert (ours.forward_features(images) - theirs(images).last_hidden_state).abs().max() < 1e-5
            pooled = theirs(images).pooler_output
            assert (ours.forward_head(ours.forward_features(images), pre_logits=True) - pooled).abs().max() < 1e-5
        else:
            assert all(name.startswith("hidden_states_norms.") for name in weights.ignored)
            assert len(weights.ignored) == 2 * len(theirs.hidden_states_norms)


def test_there_and_back(net):
    state = net.state_dict()
    for others, whose in ((to_hf(state), "hf"), (to_official(state), "official"), (state, "timm")):
        found = find_weights(others, Path("f"))
        assert found.layout == whose
        assert same(found.encoder, state)


# The authors' pre-training, and ours


def golden_state(case: str) -> tuple[State, Any]:
    """The original's state dict, in its names and layouts, and what it computed."""
    import golden_recipe

    golden = build(case)
    shapes = json.loads(str(golden.expected["shapes"]))
    state = {name: torch.from_numpy(golden_recipe.parameter(name, tuple(shape))) for name, shape in shapes.items()}
    return state, golden


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("case", ["micro_128_b1", "micro_96_b2", "atto_224_b2"])
def test_the_authors_pre_training_gives_its_recorded_numbers(case, prefix, tmp_path):
    state, golden = golden_state(case)
    arguments = argparse.Namespace(model="convnextv2_atto", mask_ratio=0.6)
    file = saved({"model": prefixed(prefix, state), "args": arguments, "epoch": 799}, tmp_path / "checkpoint-799.pth")
    model = fcmae.load(file)
    with torch.no_grad():
        features = model.encoder(golden.images, golden.mask)
        loss = model(golden.images, golden.mask).loss
    assert (on_grid(features, golden.mask).numpy() - golden.expected["enc"]).__abs__().max() < 5e-5
    assert loss.item() == pytest.approx(float(golden.expected["loss_norm1"]), rel=1e-6)


@pytest.mark.parametrize("case", ["micro_128_b1", "atto_224_b2"])
def test_the_dense_layout_of_the_same_encoder(case, tmp_path, caplog):
    """As the authors release it: dense names, no prefix, no head; the decoder is new, and that is said."""
    state, golden = golden_state(case)
    sparse = fcmae.load(saved({"model": state}, tmp_path / "checkpoint.pth"))
    dense = {
        name: value
        for name, value in to_official(golden.model.encoder.net.state_dict()).items()
        if not name.startswith("norm.")
    }
    caplog.clear()
    ours = fcmae.load(saved({"model": dense}, tmp_path / "released.pt"))
    assert same(ours.encoder.net.state_dict(), sparse.encoder.net.state_dict())
    assert "the decoder is new, the file has none; train it before you trust a prediction" in caplog.text
    ours.encoder.grn_scope = "batch"
    with torch.no_grad():
        features = ours.encoder(golden.images, golden.mask)
    assert (on_grid(features, golden.mask).numpy() - golden.expected["enc"]).__abs__().max() < 5e-5


def test_the_state_dict_of_our_autoencoder_comes_back_whole(model, tmp_path):
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    assert read_weights(file).layout == "fcmae"
    assert same(fcmae.load(file).state_dict(), model.state_dict())


def test_a_run_that_says_other_sizes_than_its_weights_have(model, tmp_path):
    """A description cannot have something built that the file does not hold."""
    options = {"_target_": "fcmae.models.create.create_model", "depths": [1, 1, 1, 1], "dims": [10**6] * 4}
    description = {"format": FORMAT, "model": options | {"decoder_dim": 10**9, "size": "huge"}}
    file = saved(described(prefixed("model.", model.state_dict()), description), tmp_path / "last.ckpt")
    assert "contradicts itself: it says dims=[1000000, 1000000, 1000000, 1000000] and holds (8, 16, 32, 64)" in refusal(
        lambda: fcmae.load(file)
    )


def test_a_classifier_becomes_an_encoder_with_a_new_decoder(net, tmp_path, caplog):
    file = saved(
        described(prefixed("net.", net.state_dict()), {"format": FORMAT, "model": {}, "task": "classification"}),
        tmp_path / "last.ckpt",
    )
    model = fcmae.load(file)
    wanted = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
    found = model.encoder.net.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert torch.equal(found["head.norm.weight"], torch.ones(DIMS[-1]))  # plays no part here
    assert "decoder is new" in caplog.text


def test_a_decoder_of_another_width_is_refused_or_left_new(model, tmp_path):
    file = saved(model.state_dict(), tmp_path / "model.pth")
    wider = fcmae.create_model(**MODEL | {"decoder_dim": 24})
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    told = refusal(lambda: load_autoencoder(wider, read_weights(file)))
    assert "has a decoder that the model's differs from (mask_token is (1, 16, 1, 1), here (1, 24, 1, 1))" in told
    assert "set model.decoder_dim" in told
    assert same(wider.state_dict(), before)
    report = load_autoencoder(wider, read_weights(file), strict=False)
    assert not report.decoder
    assert report.lines()[-1].startswith("decoder: new, the file's does not fit (mask_token")
    assert (
        same(wider.decoder.state_dict(), fcmae.create_model(**MODEL | {"decoder_dim": 24}).decoder.state_dict())
        is False
    )
    assert torch.equal(wider.encoder.net.state_dict()["stem.0.weight"], model.encoder.net.state_dict()["stem.0.weight"])


def test_other_channels_take_a_new_decoder(model, tmp_path):
    weights = read_weights(saved(model.state_dict(), tmp_path / "model.pth"))
    bands = fcmae.create_model(**MODEL, in_chans=13)
    report = load_autoencoder(bands, weights, adapt_in_chans="repeat")
    assert not report.decoder
    assert "first convolution: adapted from 3 channels to 13" in report.lines()


def own_decoder(model: FCMAE, *others: str) -> State:
    """The state dict of the model with another decoder, one weight per name."""
    body = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    # Names that the authors' sparse models have too, and what a decoder of ours could not be.
    values = {"blocks.0.ln.weight": torch.ones(4), "counter": torch.tensor(7), "shift": torch.tensor([torch.inf])}
    return body | prefixed("decoder.", values | {name: torch.ones(2) for name in others})


@pytest.mark.parametrize("token", [None, torch.ones(2), torch.ones(1, 2, 1, 1)])
def test_a_decoder_of_somebodys_own_keeps_nobody_from_the_encoder(token, model, tmp_path, caplog):
    state = own_decoder(model) | ({} if token is None else {"decoder.mask_token": token})
    file = saved(state, tmp_path / "model.pth")
    weights = read_weights(file)
    assert weights.layout == "fcmae"
    assert same(weights.weights, model.encoder.net.state_dict())
    assert weights.decoder.keys() == {name.removeprefix("decoder.") for name in state if name.startswith("decoder.")}
    if token is not None and token.ndim == 4:  # then it may well be ours, changed
        assert "has a decoder that the model's differs from" in refusal(lambda: fcmae.load(file))
        return
    loaded = fcmae.load(file)
    assert torch.equal(
        loaded.encoder.net.state_dict()["stem.0.weight"], model.encoder.net.state_dict()["stem.0.weight"]
    )
    assert "the decoder is new, the file's does not fit (it lacks blocks.0.conv_dw.bias)" in caplog.text


def test_a_decoder_that_does_not_know_a_mask_token(model):
    """With no names but ours it is one of ours that is damaged, unless the file tells who made it."""
    state = model.state_dict()
    del state["decoder.mask_token"]
    for made_by in (None, CREATE_MODEL):
        assert "holds only part of a decoder" in refusal(
            lambda made_by=made_by: find_weights(state, Path("f"), made_by=made_by)
        )
    assert find_weights(state, Path("f"), made_by="lab.model").decoder.keys() == model.decoder.state_dict().keys() - {
        "mask_token"
    }
    assert "holds only part of a decoder" in refusal(
        lambda: find_weights(own_decoder(model), Path("f"), made_by=CREATE_MODEL)
    )


@pytest.mark.parametrize("made_by", [CREATE_MODEL, "lab.model"])
def test_a_checkpoint_tells_whose_its_decoder_is(made_by, model, tmp_path):
    """All its names may be those of ours, whoever made it."""
    state = prefixed("model.", model.state_dict())
    del state["model.decoder.mask_token"]
    file = saved(described(state, {"format": FORMAT, "model": {"_target_": made_by}}), tmp_path / "last.ckpt")
    if made_by == CREATE_MODEL:
        assert "holds only part of a decoder" in refusal(lambda: read_weights(file))
    else:
        assert same(read_weights(file).weights, model.encoder.net.state_dict())
        assert fcmae.load_trained(file).net.num_features == DIMS[-1]


def test_what_a_decoder_of_ours_holds_is_looked_at(model):
    state = model.state_dict() | {"decoder.pred.bias": torch.full((3072,), torch.nan)}
    assert "pred.bias holds values that are not finite" in refusal(lambda: find_weights(state, Path("f")))


# What does not fit, or only in part


def test_in_part_only_when_asked(net, tmp_path):
    state = {name: value for name, value in net.state_dict().items() if "stages.2.blocks.0.mlp.fc1" not in name}
    state |= {"stages.1.blocks.0.norm.weight": torch.ones(3), "extra.weight": torch.ones(2)}
    weights = read_weights(saved(state, tmp_path / "net.pth"))
    ours = micro_net()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    told = refusal(lambda: load_into(ours, weights))
    assert "2 missing (first: stages.2.blocks.0.mlp.fc1.bias)" in told
    assert "1 unknown (first: extra.weight)" in told
    assert "1 of another shape (first: stages.1.blocks.0.norm.weight)" in told
    assert "strict=false" in told
    assert same(ours.state_dict(), before)

    report = load_into(ours, weights, strict=False)
    assert set(report.fresh) == {
        "stages.1.blocks.0.norm.weight",
        "stages.2.blocks.0.mlp.fc1.weight",
        "stages.2.blocks.0.mlp.fc1.bias",
    }
    assert set(report.left_out) == {"stages.1.blocks.0.norm.weight", "extra.weight"}
    found = ours.state_dict()
    for name in found:
        assert torch.equal(found[name], before[name] if name in report.fresh else net.state_dict()[name]), name
    lines = report.lines()
    assert lines[1] == (
        "encoder: 3 tensors (stages.1.blocks.0.norm.weight, stages.2.blocks.0.mlp.fc1.weight, "
        "stages.2.blocks.0.mlp.fc1.bias) new, not in the checkpoint or of another shape there"
    )
    assert lines[2] == "encoder: 2 tensors (stages.1.blocks.0.norm.weight, extra.weight) of the checkpoint not used"


def test_a_smaller_network_in_part(net, tmp_path):
    weights = read_weights(saved(net.state_dict(), tmp_path / "net.pth"))
    deeper = micro_net(depths=(1, 1, 3, 1))
    assert "use +model=custom model.depths=[1,1,1,1]" in refusal(lambda: load_into(deeper, weights))
    report = load_into(deeper, weights, strict=False)
    assert {name.split(".")[3] for name in report.fresh} == {"1", "2"}
    assert not report.left_out


def test_a_network_that_fits_nowhere(net, tmp_path):
    weights = read_weights(saved(net.state_dict(), tmp_path / "net.pth"))
    other = micro_net(7, dims=(9, 18, 36, 72), in_chans=1)
    assert "fits the model nowhere" in refusal(lambda: load_into(other, weights, strict=False))


def test_an_unknown_layout_lists_the_keys_that_puzzled(tmp_path):
    state = {f"layer{i}.conv.weight": torch.zeros(2) for i in range(5)}
    told = refusal(lambda: read_weights(saved(state, tmp_path / "resnet.pth")))
    assert "its 5 weights begin with layer0.conv.weight, layer1.conv.weight, layer2.conv.weight" in told
    assert layout(state) is None


# Files made to harm


def aliased(state: State) -> State:
    """A thousand more blocks, all of one storage."""
    more = {f"stages.2.blocks.{i}.{name}": value for i in range(1, 1000) for name, value in block(state).items()}
    return state | more


def block(state: State) -> State:
    prefix = "stages.2.blocks.0."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


HARMFUL: dict[str, tuple[Callable[[State], State], str]] = {
    "strides of zero": (
        lambda state: state | {"stages.3.blocks.0.conv_dw.weight": torch.zeros(1).expand(10**9, 1, 7, 7)},
        "claims 196,0.* bytes of weights and stores fewer",
    ),
    "one storage under many names": (aliased, "bytes of weights and stores fewer"),
    "a block far away": (
        lambda state: state | {"stages.2.blocks.9999.conv_dw.weight": torch.zeros(32, 1, 7, 7)},
        "holds only part of a ConvNeXt V2",
    ),
    "not a number": (
        lambda state: state | {"stages.1.blocks.0.norm.bias": torch.full((16,), float("nan"))},
        "stages.1.blocks.0.norm.bias holds values that are not finite",
    ),
    "whole numbers": (
        lambda state: state | {"stages.1.blocks.0.norm.bias": torch.zeros(16, dtype=torch.int8)},
        "stages.1.blocks.0.norm.bias is torch.int8: give weights in floating point",
    ),
    "sparse": (
        lambda state: state | {"stem.0.bias": torch.zeros(8).to_sparse()},
        "names with a plain tensor each",
    ),
    "a kernel without axes": (
        lambda state: {"dwconv.kernel": torch.tensor(1.0), **state},
        "of its weights 1 unknown",
    ),
    "nothing, a thousand million times": (
        lambda state: state | {"head.fc.weight": torch.zeros(10**9, 0)},
        "names with a plain tensor each",
    ),
    "a classifier without axes": (
        lambda state: state | {"head.fc.weight": torch.tensor(1.0)},
        "classifier is no matrix",
    ),
    "no memory": (
        lambda state: state | {"stem.0.bias": torch.zeros(8, device="meta")},
        "a plain tensor each|cannot be read",
    ),
    "two names for one": (
        lambda state: state | {"module.stem.0.bias": torch.zeros(8)},
        "two names that mean the same",
    ),
    "larger than float32": (
        lambda state: state | {"stem.0.bias": torch.full((8,), 1e300, dtype=torch.float64)},
        "stem.0.bias holds values that are not finite",
    ),
    "a decoder whose token has no axes": (
        lambda state: prefixed("encoder.net.", state) | {"decoder.mask_token": torch.tensor([1.0])},
        "holds only part of a decoder",
    ),
    "a decoder without mask token": (
        lambda state: prefixed("encoder.net.", state) | {"decoder.proj.weight": torch.zeros(1)},
        "holds only part of a decoder",
    ),
    "wrong shapes": (
        lambda state: state | {"stages.0.blocks.0.mlp.fc1.weight": torch.zeros(3, 3)},
        "does not fit the model: of its weights 1 of another shape",
    ),
}


HALF_A_CLASSIFIER: dict[str, dict[str, Tensor | None]] = {
    "no bias": {"head.fc.bias": None},
    "another width": {"head.fc.weight": torch.zeros(5, 32)},
    "another bias": {"head.fc.bias": torch.zeros(7)},
    "no final norm": {"head.norm.weight": None},
    "another final norm": {"head.norm.bias": torch.zeros(3)},
}


@pytest.mark.parametrize("what", HALF_A_CLASSIFIER)
def test_a_classifier_that_is_there_in_part_is_not_made_up(what, net, tmp_path):
    state = {name: v for name, v in (net.state_dict() | HALF_A_CLASSIFIER[what]).items() if v is not None}
    told = refusal(lambda: fcmae.load_trained(saved(state, tmp_path / "net.pth")))
    assert "holds only part of a classifier, head." in told


@pytest.mark.parametrize("how", HARMFUL)
def test_a_state_dict_made_to_harm(how, net, tmp_path):
    change, told = HARMFUL[how]
    file = saved(change(net.state_dict()), tmp_path / "net.pth")
    for read in (fcmae.load, fcmae.load_trained):
        with pytest.raises(fcmae.UserError, match=told) as caught:
            read(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_zip_bomb(net, tmp_path):
    """What torch stores as it is, compressed: a few kilobytes that would unpack to a gigabyte."""
    file = saved(net.state_dict(), tmp_path / "net.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = b"\0" * 10**7 if entry.filename.endswith("/data/0") else old.read(entry)
            new.writestr(entry.filename, content)
    assert bomb.stat().st_size < 10**6
    assert "is a zip file as torch does not write it" in refusal(lambda: read_weights(bomb))


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes
    text = json.dumps({"stem.0.weight": entry}).encode()
    return struct.pack("<Q", len(text)) + text


LYING = {
    "length": struct.pack("<Q", 2**63) + b"{}" + bytes(16),
    "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "shape": header(shape=[10**9]) + bytes(16),
    "negative shape": header(shape=[-1]) + bytes(16),
    "offsets behind the end": header(data_offsets=[0, 10**12]) + bytes(16),
    "offsets that overlap": header(data_offsets=[8, 4]) + bytes(16),
    "kind": header(dtype="PICKLE") + bytes(16),
    "no JSON": struct.pack("<Q", 16) + bytes(32),
}


@pytest.mark.parametrize("lie", LYING)
def test_a_safetensors_file_with_a_lying_header(lie, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(LYING[lie])
    assert "cannot be read, it is truncated or no safetensors file" in refusal(lambda: read_weights(file))


@pytest.mark.parametrize("what", ["masking", "target", "_target_"])
def test_a_configuration_cannot_name_code(what, model, tmp_path):
    options: dict[str, Any] = {"_target_": "fcmae.models.create.create_model", "depths": [1, 1, 1, 1]}
    options |= {what: {"_target_": "os.mkdir", "path": str(tmp_path / "was here")}}
    if what == "_target_":
        options["_target_"] = "os.system"
    export = tmp_path / "export"
    export.mkdir()
    save_file(model.encoder.net.state_dict(), export / "encoder.safetensors")
    (export / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "model": options}))
    file = saved(
        described(prefixed("model.", model.state_dict()), {"format": FORMAT, "model": options}), tmp_path / "last.ckpt"
    )
    for path in (file, export):
        told = refusal(lambda path=path: fcmae.load(path))
        assert "not one that fcmae.load builds (fcmae." in told or "did not make" in told
    fcmae.load_trained(export)  # builds a network of the weights' sizes, and nothing else
    assert not (tmp_path / "was here").exists()


WRONG: dict[str, Any] = {
    "best": [3, [], "x", {"metric": 3}, {"metric": "val_acc1"}],
    "lineage": [3, "abc", [1], [{}], [{"source": "x"}], [{"source": "x", "sha256": "0", "license": "a\n# b"}]],
    "license": [3, "a b", "x" * 100, ["mit"]],
    "recipe": [3, []],
    "versions": ["x"],
    "steps": [[1]],
    "fcmae": [3],
    "model": [3, None],
    "class_names": ["abcde", [1, 2, 3, 4, 5], {"a": 1}, ["a"] * 9],
    "multi_label": ["yes"],
    "crop_pct": [1e-9, "half", float("nan")],
    "input": [
        3,
        {"mean": 5},
        {"mean": ["a"] * 3},
        {"std": [0.0] * 3},
        {"std": [-1.0] * 3},
        {"std": [float("nan")] * 3},
        {"image_size": "large"},
        {"image_size": [60000, 60000]},
        {"image_size": 10**20},
        {"mean": [10**400] * 3},
        {"image_size": True},
        {"image_size": [64]},
        {"mean": [0.5], "std": [0.5]},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_a_description_that_cannot_be(name, value, net, tmp_path):
    said = {"format": FORMAT, "model": {}, "task": "classification", name: value}
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / DESCRIPTION).write_text(json.dumps(said))
    file = saved(described(prefixed("net.", net.state_dict()), said), tmp_path / "last.ckpt")
    for path in (tmp_path, file):
        assert str(path) in refusal(lambda path=path: fcmae.load_trained(path))


def test_a_description_that_no_export_could_write(net, tmp_path):
    said = {"format": FORMAT, "model": {}, "task": "classification", "recipe": {"a": torch.zeros(3)}}
    file = saved(described(prefixed("net.", net.state_dict()), said), tmp_path / "last.ckpt")
    assert "says of itself recipe=" in refusal(lambda: fcmae.load_trained(file))


@pytest.mark.parametrize("text", ["[1]", "[" * 200_000, "{", '"x"', ""])
def test_a_description_that_is_none(text, net, tmp_path):
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    for name in (DESCRIPTION, "config.json"):
        (tmp_path / name).write_text(text)
    assert fcmae.load_trained(tmp_path).class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("masking", [3, [1], {"_target_": ["x"]}, {"_target_": 3}])
def test_a_masking_that_is_none(masking, model, tmp_path):
    options = {"_target_": "fcmae.models.create.create_model", "masking": masking}
    file = saved(
        described(prefixed("model.", model.state_dict()), {"format": FORMAT, "model": options}), tmp_path / "l.ckpt"
    )
    assert "which is not one that fcmae.load builds" in refusal(lambda: fcmae.load(file))


def test_other_channels_for_an_autoencoder(model, tmp_path, caplog):
    file = saved(model.state_dict(), tmp_path / "model.pth")
    assert "adapt_in_chans=sum or repeat" in refusal(lambda: fcmae.load(file, in_chans=1))
    grey = fcmae.load(file, in_chans=1, adapt_in_chans="sum")
    assert grey.encoder.in_chans == 1
    assert "decoder is new" in caplog.text


# What others' folders say


def test_what_timms_and_transformers_folders_say(net, tmp_path):
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 96], "crop_pct": 0.9}
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    names = ["a", "b", "c", "d", "e"]
    config = {"architecture": "convnextv2_tiny", "pretrained_cfg": about | {"license": "mit"}, "label_names": names}
    (folder / "config.json").write_text(json.dumps(config))
    trained = fcmae.load_trained(folder)
    assert trained.class_names == tuple(names)
    assert trained.preparation.image_size == (64, 96)
    assert trained.preparation.mean == (0.1, 0.2, 0.3)
    assert trained.preparation.crop_pct == 0.9
    assert trained.source.license == "mit"

    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in to_hf(net.state_dict()).items()}, folder / "model.safetensors"
    )
    labels = {str(number): name for number, name in enumerate(names)}
    config = {"model_type": "convnextv2", "architectures": ["ConvNextV2ForImageClassification"], "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"size": {"shortest_edge": 64}, "crop_pct": 0.8, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    trained = fcmae.load_trained(folder)
    assert trained.class_names == tuple(names)
    assert (trained.preparation.image_size, trained.preparation.crop_pct) == ((64, 64), 0.8)
    (folder / "config.json").write_text(json.dumps(config | {"id2label": 7}))
    assert fcmae.load_trained(folder).class_names == ("0", "1", "2", "3", "4")


PROCESSORS: list[tuple[dict[str, Any], tuple[int, int], float | str]] = [
    ({"size": {"shortest_edge": 224}, "crop_pct": 0.8}, (224, 224), 0.8),
    ({"size": {"shortest_edge": 384}, "crop_pct": 0.8}, (384, 384), "warp"),
    ({"size": {"shortest_edge": 383}, "crop_pct": 0.8}, (383, 383), 0.8),
    ({"size": 224}, (224, 224), 0.875),
    ({"size": {"height": 64, "width": 96}}, (64, 96), "warp"),
    (
        {"size": {"shortest_edge": 250}, "do_center_crop": True, "crop_size": {"height": 200, "width": 200}},
        (200, 200),
        0.8,
    ),
    ({"size": {"shortest_edge": 250}, "do_center_crop": True, "crop_size": 200}, (200, 200), 0.8),
]


@pytest.mark.parametrize(("processor", "size", "crop_pct"), PROCESSORS)
def test_how_an_image_processor_prepares_pictures(processor, size, crop_pct, net, tmp_path):
    save_file(
        {name: value.contiguous() for name, value in to_hf(net.state_dict()).items()}, tmp_path / "model.safetensors"
    )
    architecture = {"model_type": "convnextv2", "architectures": ["ConvNextV2ForImageClassification"]}
    config = architecture | {
        "id2label": {str(n): "abcde"[n] for n in range(5)},
        "problem_type": "multi_label_classification",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    numbers = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | numbers))
    trained = fcmae.load_trained(tmp_path)
    assert (trained.preparation.image_size, trained.preparation.crop_pct) == (size, crop_pct)
    assert trained.preparation.mean == (0.1,) * 3
    assert trained.multi_label


def test_what_nobody_says_is_as_for_imagenet(tmp_path, randomise):
    for channels, mean in ((3, (0.485, 0.456, 0.406)), (2, (0.5, 0.5))):
        state = randomise(micro_net(in_chans=channels)).state_dict()
        trained = fcmae.load_trained(saved(state, tmp_path / "net.pth"))
        assert trained.preparation.mean == mean
        assert len(trained.preparation.std) == channels


@pytest.mark.parametrize(
    "name",
    ["convnextv2_tiny_1k_224_fcmae.pt", "convnextv2_base_22k_384_ema (1).pth", "ConvNeXtV2_tiny_1k_224_ema.pth.tar"],
)
def test_the_authors_files_are_known_by_their_names(name, net, tmp_path):
    assert read_weights(saved({"model": official(net.state_dict())}, tmp_path / name)).license == "cc-by-nc-4.0"


def test_what_a_card_beside_the_weights_says(net, tmp_path):
    """As of a repository that was fetched by hand."""
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    cards = {
        "license: mit": "mit",
        "license: [mit, cc-by-nc-4.0]": "cc-by-nc-4.0",
        "license: CC-BY-NC-SA-4.0": "CC-BY-NC-SA-4.0",
        "license: fair-noncommercial-research-license": "fair-noncommercial-research-license",
        "license: apache-2.0\nbase_model: facebook/convnextv2-tiny-1k-224": "cc-by-nc-4.0",
        "license: {a: b}": None,
        "license: 'two words'": None,
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nlicense: [*b,*b,*b,*b]": None,
        "[": None,
    }
    for text, license in cards.items():
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        assert read_weights(tmp_path).license == license, text


@pytest.mark.parametrize(
    "place", ["facebook--convnextv2-tiny-1k-224", "models--facebook--convnextv2-tiny-1k-224/snapshots/0"]
)
def test_the_authors_weights_are_known_by_the_folder_that_they_were_fetched_into(place, net, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_weights(folder).license == "cc-by-nc-4.0"


def test_folders_that_are_not_read(net, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "holds its weights in several files: save them in one" in refusal(lambda: read_weights(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / DESCRIPTION).write_text("{}")
    assert "is an export for other programs alone" in refusal(lambda: read_weights(tmp_path))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "convnextv2", "hidden_act": "relu"}')
    assert "hidden_act='relu', and only gelu is computed" in refusal(lambda: read_weights(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "convnextv2", "image_size": 384}')
    assert fcmae.load_trained(tmp_path).preparation.image_size == (384, 384)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert read_weights(f"~/{tmp_path.name}").file == tmp_path / "model.safetensors"


def test_an_official_file_keeps_its_layout_through_read(net, tmp_path):
    weights = read_weights(saved({"model": official(net.state_dict())}, tmp_path / "f.pth"))
    assert (weights.layout, weights.source, weights.license) == ("official", "f.pth", None)
    name = "convnextv2_atto_1k_224_fcmae.pt"
    assert read_weights(saved({"model": official(net.state_dict())}, tmp_path / name)).license == "cc-by-nc-4.0"
