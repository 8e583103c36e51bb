"""The encoder is timm's ConvNeXt: its names, its shapes, its numbers."""

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt

import fcmae
from fcmae import UserError
from fcmae.checkpoints.format import FORMAT
from fcmae.engines import get_engine
from fcmae.models.convnext import SIZES
from fcmae.models.encoder import Encoder

# size: parameters with the head of 1000 classes, without the classifier (paper appendix A; `small` is timm's)
PARAMETERS = {
    "atto": (3_708_400, 3_387_400),
    "femto": (5_233_240, 4_848_240),
    "pico": (9_066_280, 8_553_280),
    "nano": (15_623_800, 14_982_800),
    "tiny": (28_635_496, 27_866_496),
    "small": (50_318_440, 49_549_440),
    "base": (88_717_800, 87_692_800),
    "large": (197_956_840, 196_419_840),
    "huge": (660_289_640, 657_472_640),
}
ALL_SIZES = pytest.mark.parametrize("size", SIZES)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@ALL_SIZES
def test_names_shapes_and_parameter_counts(size):
    with torch.device("meta"):
        ours = fcmae.create_model(size).encoder.net
        theirs = timm.create_model(f"convnextv2_{size}", num_classes=0)
        with_head = timm.create_model(f"convnextv2_{size}", num_classes=1000)
    assert {name: x.shape for name, x in ours.state_dict().items()} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }
    assert (count(with_head), count(ours)) == PARAMETERS[size]


@ALL_SIZES
@torch.no_grad()
def test_with_nothing_hidden_the_encoder_is_timms(size, randomise):
    encoder = fcmae.create_model(size, depths=(1, 1, 2, 1), decoder_dim=8).encoder
    net = timm.create_model(f"convnextv2_{size}", depths=(1, 1, 2, 1), num_classes=0)
    net.load_state_dict(randomise(encoder).net.state_dict())
    images = torch.randn(2, 3, 96, 64)
    packed = encoder(images, fcmae.Mask(torch.ones(2, 3, 2, dtype=torch.bool)))  # (B, C4, 6, 1)
    theirs = net.forward_features(images)  # (B, C4, 3, 2)
    assert (packed.view_as(theirs) - theirs).abs().max() < 1e-5 * theirs.abs().max()


V1 = {
    "convnext_atto": {"conv_mlp": True},
    "convnext_tiny": {"conv_mlp": False},
    "convnext_nano": {"kernel_sizes": (3, 5, 7, 9)},  # other kernels than 7
    "convnext_pico": {"head_norm_first": True},  # the final norm comes before the pooling
}


@pytest.mark.parametrize("name", V1)
@torch.no_grad()
def test_a_convnext_of_the_first_version_works_too(name, randomise):
    net = timm.create_model(name, depths=(1, 1, 2, 1), in_chans=4, ls_init_value=1e-6, **V1[name]).double()
    assert not any("grn" in key for key in net.state_dict())
    randomise(net)  # with layer scales that matter
    images = torch.randn(2, 4, 64, 96, dtype=torch.float64)
    packed = Encoder(net, engine=get_engine("torch"))(images, fcmae.Mask(torch.ones(2, 2, 3, dtype=torch.bool)))
    theirs = net.forward_features(images)
    assert (packed.view_as(theirs) - theirs).abs().max() < 1e-12 * theirs.abs().max()


@torch.no_grad()
def test_trained_weights_serve_timm(randomise):
    net = randomise(fcmae.create_model("atto", image_size=64)).encoder.net
    theirs = timm.create_model("convnextv2_atto", num_classes=0)
    theirs.load_state_dict(net.state_dict())  # strict
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(net.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("options", [{"stem_type": "overlap"}, {"stem_type": "overlap_tiered"}, {"output_stride": 16}])
def test_a_network_that_mixes_patches_is_refused(options):
    net = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0, **options)
    with pytest.raises(UserError, match="only ConvNeXts with stem_type='patch'"):
        Encoder(net, engine=get_engine("torch"))


def test_a_loaded_net_can_be_fine_tuned_whole(tmp_path):
    """The final norm is frozen while pre-training and must not stay so."""
    model = fcmae.create_model(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), decoder_dim=16)
    assert not any(parameter.requires_grad for parameter in model.encoder.net.head.parameters())
    options = {"_target_": "fcmae.models.create.create_model", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    description = {"format": FORMAT, "model": options | {"decoder_dim": 16}}
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"fcmae": description, "state_dict": weights}, tmp_path / "last.ckpt")
    loaded = fcmae.load(tmp_path / "last.ckpt")
    assert all(parameter.requires_grad for parameter in loaded.encoder.net.parameters())
