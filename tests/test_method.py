"""What the method promises: hidden is hidden, images do not mix, training starts sane and stays finite."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fcmae
from fcmae.models.block import compiled_block, global_response_norm
from fcmae.models.targets import Pixels

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "decoder_dim": 16, "image_size": 96}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("patch_size", [32, 64])
def test_hidden_pixels_have_no_influence_and_no_gradient(patch_size, randomise, draw_mask):
    encoder = randomise(fcmae.create_model(**SMALL)).encoder
    images, mask = torch.randn(2, 3, 3 * patch_size, 3 * patch_size), draw_mask(2, 3, 3, 4)
    hidden = ~mask.visible.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
    changed = images.masked_fill(hidden, torch.nan).requires_grad_()
    features = encoder(changed, mask)
    assert torch.equal(features, encoder(images, mask))
    features.square().sum().backward()
    assert torch.equal(changed.grad != 0, ~hidden.expand_as(images))  # exactly zero where hidden, and nowhere else


def test_a_batch_is_its_images_one_by_one(randomise, draw_mask):
    model = randomise(fcmae.create_model(**SMALL)).double()
    images, mask = torch.randn(3, 3, 96, 128, dtype=torch.float64), draw_mask(3, 3, 4, 5)
    together = model(images, mask)
    together.loss.backward()
    expected = gradients(model)

    model.zero_grad()
    alone = [model(images[i : i + 1], fcmae.Mask(mask.visible[i : i + 1])) for i in range(3)]
    loss = torch.stack([output.loss for output in alone]).mean()
    loss.backward()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([output.pred for output in alone]), together.pred, **close)
    torch.testing.assert_close(loss, together.loss, **close)
    torch.testing.assert_close(gradients(model), expected, **close)


@pytest.mark.parametrize("size", ["atto", "femto", "pico", "nano", "tiny", "small", "base"])
@torch.no_grad()
def test_the_first_loss_is_near_one(size):
    model = fcmae.create_model(size, image_size=96)
    for images in (torch.randn(4, 3, 96, 96), torch.rand(4, 3, 96, 96)):
        assert 0.9 < model(images).loss < 1.2


@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_initial_parameters(size):
    model = fcmae.create_model(size)
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "mask_token" or (leaf == "weight" and kinds[owner] in (nn.Conv2d, nn.Linear)):
            tolerance = 5 / (2 * parameter.numel()) ** 0.5  # five deviations of a sample's deviation
            assert parameter.std().item() == pytest.approx(0.02, rel=tolerance), name
            assert parameter.abs().max() < 7 * 0.02, name  # no outlier: 1 in 4e11 is beyond seven deviations
        else:  # biases, and the scales of GRN (0) and of the layer norms (1)
            is_scale = leaf == "weight" and "grn" not in owner
            assert (parameter == (1 if is_scale else 0)).all(), name


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")],
        ),
    ],
)
def test_compiles_without_a_break(backend, randomise, draw_mask):
    torch.compiler.reset()
    encoder = randomise(fcmae.create_model(**SMALL)).encoder
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for _ in range(2):  # the second mask is other data for the same graph
        images, mask = torch.randn(2, 3, 96, 96), draw_mask(2, 3, 3, 4)
        results = []
        for network in (encoder, compiled):
            encoder.zero_grad()
            features = network(images, mask)
            features.square().mean().backward()
            results.append({"features": features.detach()} | gradients(encoder))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_compiled_blocks_are_the_blocks_and_share_graphs(recompute, randomise, draw_mask):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = SMALL | {"depths": [2, 2, 3, 2], "decoder_depth": 2, "grad_checkpointing": recompute}
    model = randomise(fcmae.create_model(**options))
    images, mask = torch.randn(2, 3, 96, 96), draw_mask(2, 3, 3, 4)
    model(images, mask).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.encoder.run_block = model.decoder.run_block = compiled_block(counter)
    for _ in range(2):
        model(images, draw_mask(2, 3, 3, 4))  # other data for the same graphs
    model(images, mask).loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 4 + 2  # one per stage; the decoder's last block computes less than its first


def test_bfloat16_autocast_stays_close_and_finite(randomise):
    model = randomise(fcmae.create_model(**SMALL))
    images = torch.randn(4, 3, 96, 96)
    expected = model(images)
    expected.loss.backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, _ = model(images, expected.mask)
    loss.backward()
    assert loss.dtype == torch.float32
    assert pred.dtype == torch.bfloat16  # it did run in half precision
    assert loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    assert (pred - expected.pred).norm() < 0.05 * expected.pred.norm()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.2 * exact[name].norm(), name


class Norms(TorchDispatchMode):
    """Notes the type of every vector norm that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() in ("aten::linalg_vector_norm", "fcmae::cpu_gelu_norm"):
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize("engine", ["torch", "cpu"])
@pytest.mark.parametrize("autocast", [True, False])
def test_grn_statistics_are_float32(autocast, engine):
    model, images = fcmae.create_model(**SMALL, engine=engine), torch.randn(2, 3, 96, 96)
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    with Norms() as norms, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(images).loss.dtype == torch.float32
    assert norms.dtypes == [torch.float32] * 6  # five blocks of the encoder, one of the decoder


def test_layer_norm_statistics_are_float32():
    """torch's kernels sum in float32 whatever they are given; only the result is rounded."""
    x = (100 + torch.randn(64, 512)).bfloat16()  # in bfloat16 the variance around 100 would be mostly rounding
    weight, bias = torch.rand(512), torch.randn(512)
    exact = F.layer_norm(x.double(), (512,), weight.double(), bias.double(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.layer_norm(x, (512,), weight, bias, 1e-6)
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_grn_survives_activations_whose_norm_is_too_large_for_float16():
    x = torch.full((1, 256 * 256, 2), 300.0)  # of norm 76800; float16 ends at 65504
    x[..., 1] = 100
    weight, bias = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    y = global_response_norm(x.half(), weight, bias)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float()[0, 0], torch.tensor([525.0, 126.0]), rtol=1e-3, atol=0)


def test_all_zero_channels_have_finite_gradients():
    x = torch.randn(2, 9, 4)
    x[..., 1] = 0
    x.requires_grad_()
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    global_response_norm(x, weight, bias).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, weight, bias))

    model = fcmae.create_model(**SMALL)
    loss = model(torch.zeros(2, 3, 96, 96)).loss  # black images through a fresh encoder: every activation is zero
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_mask_that_is_given_equals_one_that_is_drawn(randomise):
    model, images = randomise(fcmae.create_model(**SMALL)), torch.randn(2, 3, 96, 96)
    drawn = model(images)
    given = model(images, fcmae.Mask(drawn.mask.visible))
    assert torch.equal(given.loss, drawn.loss)
    assert torch.equal(given.pred, drawn.pred)
    assert drawn.mask.visible.flatten(1).sum(1).tolist() == [3, 3]


def test_two_models_in_one_process_keep_their_masks_apart(randomise):
    models = [randomise(fcmae.create_model(**SMALL, grad_checkpointing="block")) for _ in range(2)]
    images = torch.randn(2, 3, 96, 96)
    masks = [model.masking(images) for model in models]
    expected = []
    for model, mask in zip(models, masks, strict=True):
        model(images, mask).loss.backward()
        expected.append(gradients(model))
        model.zero_grad()
    losses = [model(images, mask).loss for model, mask in zip(models, masks, strict=True)]
    for loss in losses:  # the first recomputes its blocks after the second has run with another mask
        loss.backward()
    for model, gradient in zip(models, expected, strict=True):
        torch.testing.assert_close(gradients(model), gradient, rtol=0, atol=0)


def test_drop_path_drops_in_training_alone(randomise):
    model = randomise(fcmae.create_model(**SMALL, drop_path_rate=0.5))
    plain = fcmae.create_model(**SMALL)
    plain.load_state_dict(model.state_dict())
    images, mask = torch.randn(4, 3, 96, 96), plain.masking(torch.zeros(4, 3, 96, 96))
    losses = [model(images, mask).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    model.eval()
    assert model(images, mask).loss == model(images, mask).loss == plain(images, mask).loss


class Centre:
    """A strategy of one's own: sees the middle of each image."""

    patch_size = 64

    def __call__(self, images):
        visible = torch.zeros(images.shape[0], images.shape[2] // 64, images.shape[3] // 64, dtype=torch.bool)
        visible[:, 1:-1, 1:-1] = True
        return fcmae.Mask(visible)


class PixelsAndSquares(Pixels):
    """A target of one's own, with two values per pixel and channel."""

    def channels(self, in_chans):
        return 2 * in_chans

    def __call__(self, images, wanted):
        return super().__call__(torch.cat([images, images.square()], dim=1), wanted)


def test_a_strategy_and_a_target_of_ones_own():
    model = fcmae.create_model(**SMALL | {"image_size": 192}, masking=Centre(), target=PixelsAndSquares())
    images = torch.randn(2, 3, 192, 256)
    loss, pred, mask = model(images)
    assert mask.visible.sum() == 2 * 1 * 2
    assert pred.shape == (2, 10, 64 * 64 * 6)
    target = model.target(images, fcmae.Mask.everything(2, 3, 4))[~mask.visible.flatten(1)].view(pred.shape)
    torch.testing.assert_close(loss, (pred - target).square().mean())


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_target_as_a_prediction_gives_the_pictures_back(norm_pix_loss):
    images, target = torch.rand(2, 3, 64, 96) * 5 + 3, Pixels(norm_pix_loss=norm_pix_loss)
    everything = fcmae.Mask.everything(2, 2, 3)
    torch.testing.assert_close(target.to_pixels(target(images, everything), images, 32), images)
    assert target(images.bfloat16(), everything).dtype == torch.float32


class OfStride:
    """Says that it has `stride` and one channel, and gives so many values per patch."""

    def __init__(self, stride, values=1, dtype=torch.float32):
        self.stride, self.values, self.dtype = stride, values, dtype

    def channels(self, in_chans):
        return 1

    def __call__(self, images, wanted):
        return torch.full((*wanted.index.shape, self.values), 3.0, dtype=self.dtype)


def test_a_target_that_gives_other_values_than_it_says_is_refused():
    model, images = fcmae.create_model(**SMALL, target=OfStride(16)), torch.randn(2, 3, 96, 96)
    with pytest.raises(fcmae.UserError, match=r"\(2, 6, 1\) of the target and \(2, 6, 4\) of the decoder: mend one"):
        model(images)  # which torch would have broadcast


def test_the_loss_is_float32_whatever_the_targets_type():
    model = fcmae.create_model(**SMALL, target=OfStride(16, 4, torch.bfloat16))
    output = model(torch.randn(2, 3, 96, 96))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, (output.pred - 3).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "tinny"}, r"size='tinny' is not one of atto, .*huge or custom; did you mean 'tiny'\?"),
        ({"size": "resnet"}, r"size='resnet' is not one of [^;]*$"),
        ({}, "size='custom' needs depths and dims"),
        ({"depths": (1, 1, 1, 1)}, "size='custom' needs depths and dims"),
        ({"size": "atto", "depths": (1, 2, 3)}, r"depths=\[1, 2, 3\] must be four numbers from 1"),
        ({"size": "atto", "dims": (8, 8, 0, 8)}, r"dims=\[8, 8, 0, 8\] must be four numbers from 1"),
        ({"size": "atto", "in_chans": 0}, "in_chans=0"),
        ({"size": "atto", "drop_path_rate": 1.0}, r"drop_path_rate=1.0: .*\[0, 1\)"),
        ({"size": "atto", "image_size": 230}, "230x230 is not a multiple of the 32-pixel .* use 224 or 256"),
        ({"size": "atto", "image_size": (224, 200)}, "instead of 200 use 192 or 224"),
        ({"size": "atto", "patch_size": 48}, "patch_size=48 is not a multiple of 32"),
        ({"size": "atto", "mask_ratio": 0}, "mask_ratio=0 hides none of the 49 patches of a 224x224 .* above 0"),
        ({"size": "atto", "mask_ratio": 1.0}, r"mask_ratio=1.0 is outside \[0, 1\)"),
        ({"size": "atto", "mask_ratio": 0.8, "image_size": 64}, "leaves none of 4 patches visible: .* below 0.75"),
        ({"size": "atto", "image_size": 32}, "leaves none of 1 patches"),
        ({"size": "atto", "grn_scope": "world"}, "grn_scope='world' is unknown: use 'image' or 'batch'"),
        ({"size": "atto", "decoder_dim": 0}, "decoder_dim=0: .* a width from 1"),
        ({"size": "atto", "decoder_depth": -1}, "decoder_depth=-1, .* a depth from 1"),
        ({"size": "atto", "decoder_depth": 0}, "decoder_depth=0, .* a depth from 1"),
        ({"size": "atto", "target": OfStride(3)}, "stride=3 does not divide 32: use 1, 2,"),
        ({"size": "atto", "target": OfStride(64)}, "stride=64 does not divide 32"),
        (
            {"size": "atto", "masking": fcmae.RandomMask(), "mask_ratio": 0.6},
            "mask_ratio=0.6 would not be used beside masking=RandomMask, .*: set masking.mask_ratio, or leave masking",
        ),
        (
            {"size": "atto", "masking": Centre(), "mask_ratio": 0.9, "patch_size": 64},
            "mask_ratio=0.9, patch_size=64 .* masking=Centre, .* masking.mask_ratio and masking.patch_size,",
        ),
        (
            {"size": "atto", "target": fcmae.Pixels(), "norm_pix_loss": False},
            "norm_pix_loss=False would not be used beside target=Pixels, .*: set target.norm_pix_loss",
        ),
        ({"size": "atto", "engine": "warp"}, "engine='warp' is unknown: use .*'torch'"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(fcmae.UserError, match=message):
        fcmae.create_model(**options)


@pytest.mark.parametrize(
    ("images", "visible", "message"),
    [
        (torch.zeros(2, 1, 64, 64), None, r"shape \(2, 1, 64, 64\), the model takes \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), torch.eye(2).bool()[None], r"shape \(3, 64, 64\), the model takes \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 64, 65), torch.eye(2).bool()[None], "64x65 is not a multiple"),
        (torch.zeros(1, 3, 64, 96), torch.eye(2).bool()[None], "1 images of 2x2 patches, the batch has 1 of 2x3"),
        (torch.zeros(3, 3, 64, 64), torch.eye(2).bool()[None], "1 images of 2x2 patches, the batch has 3 of 2x2"),
        (torch.zeros(1, 3, 64, 64), torch.ones(1, 2, 2).bool(), "shows 4 of 4 patches"),
        (torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, 2).bool(), "shows 0 of 4 patches"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(images, visible, message):
    model = fcmae.create_model(**SMALL)
    with pytest.raises(fcmae.UserError, match=message):
        model(images, None if visible is None else fcmae.Mask(visible))
