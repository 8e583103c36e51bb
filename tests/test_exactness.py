"""The packed network is the masked dense network: outputs and every gradient, in float64, to rounding."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import masked_dense_fcmae
from torch import Tensor

import fcmae
from fcmae.models.fcmae import FCMAE

SHALLOW = {"depths": (1, 1, 2, 1), "decoder_dim": 24, "image_size": 192}


def assert_same(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name


def compare(model: FCMAE, images: Tensor, mask: fcmae.Mask, **how: Any) -> None:
    """Runs both; with everything visible, the encoder alone."""
    inputs = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"images": images.requires_grad_()}
    everything_visible = bool(mask.visible.all())
    if everything_visible:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder.")}

    theirs = masked_dense_fcmae(inputs, images, mask.visible, **how)
    features = model.encoder(images, mask)
    assert_same(features, theirs.features, "features")
    probe = torch.randn_like(features)
    objectives = [(features * probe).sum(), (theirs.features * probe).sum()]
    if not everything_visible:
        loss, pred, _ = model(images, mask, whole=True)
        assert_same(loss, theirs.loss, "loss")
        assert_same(pred, theirs.pred, "pred")
        probe = torch.randn_like(pred)  # the loss alone would not see the gradients that come from visible patches
        objectives = [loss + (pred * probe).mean(), theirs.loss + (theirs.pred * probe).mean()]

    ours, expected = (torch.autograd.grad(objective, list(inputs.values())) for objective in objectives)
    for name, a, b in zip(inputs, ours, expected, strict=True):
        assert_same(a, b, f"gradient of {name}")
        assert name == "images" or b.any(), f"the gradient of {name} is zero: the test shows nothing"


# size, patches (h, w), seen, batch, channels, patch_size, grn_scope, norm_pix_loss, decoder_depth
CASES = [
    ("atto", (4, 4), 6, 3, 3, 32, "image", True, 1),
    ("atto", (3, 5), 6, 1, 3, 32, "batch", True, 1),
    ("atto", (5, 2), 1, 3, 1, 32, "image", False, 2),
    ("atto", (3, 3), 9, 3, 3, 32, "image", True, 1),
    ("atto", (2, 3), 2, 3, 5, 64, "batch", False, 1),
    ("tiny", (3, 4), 4, 3, 3, 32, "image", True, 1),
    ("tiny", (4, 2), 1, 1, 5, 32, "batch", True, 2),
    ("tiny", (2, 3), 6, 1, 1, 32, "batch", True, 1),
    ("tiny", (2, 2), 1, 3, 3, 64, "image", True, 1),
]


@pytest.mark.parametrize(
    ("size", "grid", "seen", "batch", "channels", "patch_size", "grn_scope", "norm_pix", "decoder_depth"), CASES
)
def test_equals_the_masked_dense_network(
    size, grid, seen, batch, channels, patch_size, grn_scope, norm_pix, decoder_depth, randomise, draw_mask
):
    options = {"in_chans": channels, "patch_size": patch_size, "grn_scope": grn_scope, "norm_pix_loss": norm_pix}
    model = randomise(fcmae.create_model(size, **SHALLOW, decoder_depth=decoder_depth, **options)).double()
    images = torch.randn(batch, channels, grid[0] * patch_size, grid[1] * patch_size, dtype=torch.float64)
    compare(model, images, draw_mask(batch, *grid, seen), grn_scope=grn_scope, norm_pix_loss=norm_pix)


@given(data=st.data(), h=st.integers(1, 4), w=st.integers(2, 4), batch=st.integers(1, 3), channels=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_equals_the_masked_dense_network_whatever_the_shape(data, h, w, batch, channels, randomise, draw_mask):
    options = {
        "depths": data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4), "depths"),
        "dims": data.draw(st.lists(st.integers(4, 9), min_size=4, max_size=4), "dims"),
        "decoder_depth": data.draw(st.integers(1, 2), "decoder_depth"),
        "decoder_dim": data.draw(st.integers(5, 9), "decoder_dim"),
        "patch_size": data.draw(st.sampled_from([32, 64, 96]), "patch_size"),
        "image_size": 192,
        "grn_scope": data.draw(st.sampled_from(["image", "batch"]), "grn_scope"),
        "norm_pix_loss": data.draw(st.booleans(), "norm_pix_loss"),
    }
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    model = randomise(fcmae.create_model(in_chans=channels, **options)).double()
    images = torch.randn(batch, channels, h * options["patch_size"], w * options["patch_size"], dtype=torch.float64)
    mask = draw_mask(batch, h, w, data.draw(st.integers(1, h * w), "seen"))
    compare(model, images, mask, grn_scope=options["grn_scope"], norm_pix_loss=options["norm_pix_loss"])


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("grn_scope", ["image", "batch"])
def test_recomputing_changes_no_gradient(grn_scope, recompute, randomise, draw_mask):
    images, mask = torch.randn(2, 3, 96, 96, dtype=torch.float64), draw_mask(2, 3, 3, 4)
    model = randomise(fcmae.create_model("atto", **SHALLOW, grn_scope=grn_scope)).double()
    again = fcmae.create_model("atto", **SHALLOW, grn_scope=grn_scope, grad_checkpointing=recompute).double()
    again.load_state_dict(model.state_dict())

    saved = []
    for network in (model, again):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            network(images, mask).loss.backward()
        saved.append(sum(kept))
    assert saved[1] < saved[0]  # it did recompute
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_same(again.get_parameter(name).grad, parameter.grad, name)
