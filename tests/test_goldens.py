"""The numbers of the original implementation, on its parameters, images and masks (see data/goldens/README.md)."""

import json
from pathlib import Path
from typing import NamedTuple

import golden_recipe
import numpy as np
import pytest
import torch
from torch import Tensor

import fcmae
from fcmae.models.fcmae import FCMAE

CASES = ["micro_128_b1", "micro_96_b2", "atto_224_b2"]
BOTH_LOSSES = pytest.mark.parametrize("norm_pix_loss", [False, True])


class Golden(NamedTuple):
    model: FCMAE
    images: Tensor
    mask: fcmae.Mask
    expected: dict[str, np.ndarray]


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


def build(case: str, *, norm_pix_loss: bool = True, grn_scope: str = "batch", dtype=torch.float32) -> Golden:
    with np.load(Path(__file__).parent / "data" / "goldens" / f"{case}.npz") as file:
        expected = dict(file)
    config, shapes = json.loads(str(expected["cfg"])), json.loads(str(expected["shapes"]))
    model = fcmae.create_model(
        depths=config["depths"],
        dims=config["dims"],
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        image_size=config["img_size"],
        norm_pix_loss=norm_pix_loss,
        grn_scope=grn_scope,
    )
    state = {our_name(name): our_layout(name, golden_recipe.parameter(name, tuple(s))) for name, s in shapes.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert state.keys() == trained
    model.load_state_dict(state, strict=False)
    images = torch.from_numpy(golden_recipe.images(case, len(expected["mask"]), config["img_size"]))
    h = w = config["img_size"] // 32
    visible = torch.from_numpy(~expected["mask"]).view(-1, h, w)
    return Golden(model.to(dtype), images.to(dtype), fcmae.Mask(visible), expected)


def our_name(name: str) -> str:
    """A parameter's name in the original's pre-training model -> ours."""
    leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
    *path, last = [part for part in name.split(".") if part not in ("ln", "linear")]
    last = leaf.get(last, last)
    block = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "grn": "mlp.grn"}
    match path:
        case ["encoder", "downsample_layers", "0", layer]:
            path = ["encoder.net.stem", layer]
        case ["encoder", "downsample_layers", stage, layer]:
            path = ["encoder.net.stages", stage, "downsample", layer]
        case ["encoder", "stages", stage, number, layer]:
            path = ["encoder.net.stages", stage, "blocks", number, block[layer]]
        case ["decoder", number, layer]:
            path = ["decoder.blocks", number, block[layer]]
        case _:
            path = ["decoder", *path]
    return ".".join([*path, last])


def our_layout(name: str, value: np.ndarray) -> Tensor:
    """A parameter or its gradient, rearranged: sparse kernels are stored offset by offset, rows running fastest."""
    x = torch.from_numpy(value)
    if name.endswith("dwconv.kernel"):  # (49, C)
        return x.T.reshape(-1, 1, 7, 7).transpose(2, 3)
    if name.endswith(".kernel"):  # (4, C_in, C_out)
        return x.permute(2, 1, 0).unflatten(2, (2, 2)).transpose(2, 3)
    if ".grn." in name or (name.endswith(".bias") and x.ndim == 2):
        return x.flatten()
    return x


def on_grid(packed: Tensor, mask: fcmae.Mask) -> Tensor:
    """(B, C, V, 1) -> (B, C, h, w), zero where hidden."""
    full = packed.new_zeros(packed.shape[0], *mask.grid, packed.shape[1])
    full[mask.visible] = packed[..., 0].transpose(1, 2).flatten(0, 1)
    return full.permute(0, 3, 1, 2)


@BOTH_LOSSES
def test_outputs(case, norm_pix_loss):
    model, images, mask, expected = build(case, norm_pix_loss=norm_pix_loss)
    with torch.no_grad():
        features = model.encoder(images, mask)
        loss, pred, _ = model(images, mask, whole=True)
    assert np.abs(on_grid(features, mask).numpy() - expected["enc"]).max() < 5e-5
    step = 1 if "pred" in expected else 37
    theirs = expected["pred" if step == 1 else "pred[:,::37]"]
    assert np.abs(pred.transpose(1, 2)[:, ::step].unflatten(2, mask.grid).numpy() - theirs).max() < 5e-5
    assert loss.item() == pytest.approx(float(expected[f"loss_norm{norm_pix_loss:d}"]), rel=1e-6)


@BOTH_LOSSES
def test_gradients(case, norm_pix_loss):
    model, images, mask, expected = build(case, norm_pix_loss=norm_pix_loss)
    model(images, mask).loss.backward()
    prefix = f"grad{norm_pix_loss:d}/"
    compared = [key for key in expected if key.startswith(prefix)]
    for key in compared:
        name, _, sliced = key.removeprefix(prefix).partition("[")
        theirs = our_layout(name, expected[key])
        ours = model.get_parameter(our_name(name)).grad
        ours = ours[::37] if sliced else ours
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max(), name
    assert len(compared) >= 11


@BOTH_LOSSES
def test_float64(case, norm_pix_loss):
    model, images, mask, expected = build(case, norm_pix_loss=norm_pix_loss, dtype=torch.float64)
    loss = model(images, mask).loss
    assert loss.item() == pytest.approx(float(expected[f"loss64_norm{norm_pix_loss:d}"]), rel=1e-12)
    loss.backward()
    if case != "atto_224_b2":
        return  # the others' gradients are compared whole above
    for name, shape in json.loads(str(expected["shapes"])).items():
        probe = our_layout(name, golden_recipe.unit(tuple(shape), "probe:" + name))
        grad = model.get_parameter(our_name(name)).grad
        ours = torch.stack([grad.norm(), grad.sum(), (grad * probe).sum()]).numpy()
        theirs = expected[f"gradsum{norm_pix_loss:d}/{name}"]
        assert np.abs(ours - theirs).max() < 1e-10 * theirs[0] * grad.numel() ** 0.5, name


def test_a_norm_per_image_gives_other_numbers_unless_there_is_one_image(case):
    model, images, mask, expected = build(case, grn_scope="image")
    with torch.no_grad():
        difference = np.abs(on_grid(model.encoder(images, mask), mask).numpy() - expected["enc"]).max()
    if len(images) == 1:
        assert difference < 5e-5
    else:
        assert difference > 0.3
