"""Pictures of reconstructions, and the losses of predictors that learn nothing."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.evaluation.reconstruction import GAP, GREY, HEAT, picture, reconstruct, save_png
from fcmae.evaluation.trivial import trivial_losses
from fcmae.masking import Mask, RandomMask
from fcmae.models.create import create_model
from fcmae.models.fcmae import FCMAE, Output
from fcmae.models.targets import Pixels, map_patches


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def everything(mask: Mask) -> Mask:
    return Mask.everything(len(mask.visible), *mask.grid)


class Oracle(FCMAE):
    """Predicts the target itself, plus an error."""

    def __init__(self, *, norm_pix_loss: bool = True, patch_size: int = 32, error: float = 0.0) -> None:
        masking = RandomMask(patch_size=patch_size)
        super().__init__(
            encoder=nn.Dropout(), decoder=nn.Dropout(), masking=masking, target=Pixels(norm_pix_loss=norm_pix_loss)
        )
        self.error = error

    def forward(self, images: Tensor, mask: Mask | None = None, *, whole: bool = False) -> Output:
        assert whole
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        pred = self.target(images, everything(mask)) + self.error
        return Output(pred.mean(), pred, mask)


class Brightness:
    """Another target: the mean of each channel of a patch."""

    stride = 32

    def channels(self, in_chans: int) -> int:
        return in_chans

    def __call__(self, images: Tensor, wanted: Mask) -> Tensor:
        pixels = map_patches(images, wanted).unflatten(-1, (-1, images.shape[1]))  # (B, n, p*p, C)
        average = pixels.new_full((1, pixels.shape[2]), 1 / pixels.shape[2])
        return (average @ pixels).squeeze(2)  # (B, n, C), with the operation that autocast touches

    def to_pixels(self, pred: Tensor, images: Tensor, patch_size: int) -> Tensor:
        raise AssertionError("losses need no pictures")


class Featureless(Brightness):
    to_pixels = None


def bytes_and_images(channels: int, height: int, width: int, batch: int = 2):
    """Random pixels 0 to 255, what normalising makes of them, and with which mean and std."""
    x = torch.randint(0, 256, (batch, channels, height, width))
    mean = [0.4 + 0.05 * c for c in range(channels)]
    std = [0.2 + 0.03 * c for c in range(channels)]
    shape = (channels, 1, 1)
    return x.numpy(), (x / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape), mean, std


def hidden_pixels(mask: Mask, patch_size: int) -> np.ndarray:
    return np.kron(~mask.visible.numpy(), np.ones((1, patch_size, patch_size), dtype=bool))  # (B, H, W)


def tile(image: Image.Image, row: int, column: int, height: int, width: int, factor: int) -> np.ndarray:
    """One tile of a picture whose tiles are wider than their headings, at the size of the image: (height, width, 3)."""
    top = 32 + row * (height * factor + GAP)
    left = GAP + column * (width * factor + GAP)
    pixels = np.asarray(image)[top : top + height * factor, left : left + width * factor]
    small = pixels[::factor, ::factor]
    np.testing.assert_array_equal(pixels, small.repeat(factor, 0).repeat(factor, 1))
    return small


SIZES = [(3, 96, 96, 32), (1, 64, 128, 32), (5, 128, 192, 64), (2, 224, 160, 32)]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("channels", "height", "width", "patch_size"), SIZES)
def test_a_perfect_prediction_restores_the_input(channels, height, width, patch_size, norm_pix_loss) -> None:
    model = Oracle(norm_pix_loss=norm_pix_loss, patch_size=patch_size)
    images = torch.randn(2, channels, height, width, dtype=torch.float64)
    result = reconstruct(model, images, model.masking(images))
    torch.testing.assert_close(result.pasted, images, rtol=0, atol=1e-13)
    assert result.error.max() < 1e-13


@pytest.mark.parametrize(("channels", "height", "width", "patch_size"), SIZES)
def test_only_hidden_patches_change(channels, height, width, patch_size) -> None:
    model = Oracle(patch_size=patch_size, error=0.5)
    images = torch.randn(2, channels, height, width)
    mask = model.masking(images)
    result = reconstruct(model, images, mask)
    hidden = hidden_pixels(mask, patch_size)[:, None].repeat(channels, 1)
    np.testing.assert_array_equal(result.hidden.expand_as(images).numpy(), hidden)
    assert result.input.equal(images)
    for part in (result.masked, result.pasted):
        np.testing.assert_array_equal(part.numpy()[~hidden], images.numpy()[~hidden])
    assert not result.masked.numpy()[hidden].any()
    assert not result.error.numpy()[~hidden].any()
    # An error of 0.5 in the normalised patch is half a deviation of the patch in pixels.
    for b, i, j in itertools.product(range(2), range(height // patch_size), range(width // patch_size)):
        if not mask.visible[b, i, j]:
            where = np.s_[b, :, i * patch_size : (i + 1) * patch_size, j * patch_size : (j + 1) * patch_size]
            expected = 0.5 * images.numpy()[where].std(ddof=1)
            np.testing.assert_allclose(result.error.numpy()[where], expected, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_trains_on_as_before(training) -> None:
    model = Oracle().train(training)
    model.encoder.eval()  # frozen
    images = torch.randn(1, 3, 96, 96)
    reconstruct(model, images, model.masking(images))
    assert [m.training for m in (model, model.encoder, model.decoder)] == [training, False, training]

    with pytest.raises(UserError, match="does not fit the mask's"):
        reconstruct(model, images[..., :95], model.masking(images))  # 95 is no multiple of the patch
    assert model.training is training


def test_the_real_model_predicts_what_is_shown() -> None:
    model = create_model(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], decoder_dim=8, image_size=96)
    images = torch.randn(2, 3, 96, 96)
    mask = model.masking(images)
    result = reconstruct(model, images, mask)
    expected = model.target.to_pixels(model(images, mask, whole=True).pred, images, 32).detach()
    hidden = result.hidden.expand_as(images)
    torch.testing.assert_close(result.pasted[hidden], expected[hidden])
    torch.testing.assert_close(result.error[hidden], (expected - images)[hidden].abs())
    assert not result.pasted.requires_grad
    with pytest.raises(UserError, match="mask"):
        reconstruct(model, images[:1], mask)


def test_a_target_without_pixels_cannot_be_drawn() -> None:
    model = Oracle()
    model.target = Featureless()
    images = torch.randn(1, 3, 96, 96)
    with pytest.raises(UserError, match="the target, a Featureless, has no to_pixels"):
        reconstruct(model, images, model.masking(images))


def test_low_precision_images_are_shown_in_float32() -> None:
    model, images = Oracle(), torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)
    result = reconstruct(model, images, model.masking(images))
    assert {part.dtype for part in result} == {torch.float32, torch.bool}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width", "factor"), [(96, 96, 2), (224, 224, 1), (96, 192, 1), (64, 64, 3)])
def test_the_picture_shows_the_pixels(channels, height, width, factor) -> None:
    x, images, mean, std = bytes_and_images(channels, height, width)
    model = Oracle(error=0.7)
    mask = model.masking(images)
    result = reconstruct(model, images, mask)
    image = picture(result, mean, std)
    assert image.size == (4 * (width * factor + GAP) + GAP, 2 * 32 + 2 * (height * factor + GAP))
    assert image.mode == "RGB"

    shown = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    pixels = x[:, shown].transpose(0, 2, 3, 1)
    deviation = torch.tensor(std).view(-1, 1, 1)
    pasted = (result.pasted * deviation + torch.tensor(mean).view(-1, 1, 1)).numpy()[:, shown].transpose(0, 2, 3, 1)
    error = (result.error * deviation).mean(dim=1).numpy()
    hidden = hidden_pixels(mask, 32)
    for row in range(2):
        first, second, third, fourth = (tile(image, row, column, height, width, factor) for column in range(4))
        np.testing.assert_array_equal(first, pixels[row])
        np.testing.assert_array_equal(second, np.where(hidden[row, :, :, None], GREY, pixels[row]))
        np.testing.assert_allclose(third, (255 * pasted[row]).clip(0, 255), rtol=0, atol=0.51)
        position = (error[row] / 0.5).clip(0, 1) * (len(HEAT) - 1)
        heat = [np.interp(position, range(len(HEAT)), levels) for levels in zip(*HEAT, strict=True)]
        np.testing.assert_allclose(fourth, np.stack(heat, axis=-1), rtol=0, atol=2)  # 256 levels
        assert not fourth[~hidden[row]].any()


@pytest.mark.parametrize(("height", "width"), [(160, 32), (32, 320), (32, 32)])
def test_headings_fit_any_shape(height, width) -> None:
    _, images, mean, std = bytes_and_images(3, height, width, batch=1)
    mask = Mask(torch.zeros(1, height // 32, width // 32, dtype=torch.bool))
    image = picture(reconstruct(Oracle(), images, mask), mean, std)
    assert image.width >= 4 * 100
    edge = np.concatenate([np.asarray(image)[:, :2].ravel(), np.asarray(image)[:, -2:].ravel()])
    assert (edge == 255).all()


def test_a_diverged_model_still_gives_a_picture() -> None:
    _, images, mean, std = bytes_and_images(3, 64, 64)
    model = Oracle(error=float("nan"))
    mask = model.masking(images)
    third = tile(picture(reconstruct(model, images, mask), mean, std), 0, 2, 64, 64, 3)
    assert (third[hidden_pixels(mask, 32)[0]] == 255).all()


def test_picture_refuses_what_does_not_fit() -> None:
    _, images, mean, std = bytes_and_images(3, 64, 64)
    result = reconstruct(Oracle(), images, RandomMask()(images))
    with pytest.raises(UserError, match="each of 3 channels"):
        picture(result, mean[:1], std)
    with pytest.raises(UserError, match="error_maximum=0"):
        picture(result, mean, std, error_maximum=0)


def test_save_png_writes_all_or_nothing(tmp_path) -> None:
    path = tmp_path / "new" / "picture.png"
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    save_png(image, path)
    save_png(image, str(path))
    with Image.open(path) as written:
        assert np.asarray(written).tolist() == np.asarray(image).tolist()

    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot write mode"):
        save_png(Image.new("LAB", (3, 2)), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def naive_losses(values: np.ndarray, visible: np.ndarray) -> tuple[float, float]:
    """values (B, h, w, D), visible (B, h, w)."""
    mean, nearest = [], []
    cells = list(itertools.product(range(visible.shape[1]), range(visible.shape[2])))
    for patches, seen in zip(values, visible, strict=True):
        for cell in cells:
            if seen[cell]:
                continue
            mean.append(np.mean((patches[cell] - patches[cell].mean()) ** 2))
            closest, distance = None, np.inf
            for other in cells:
                squared = (cell[0] - other[0]) ** 2 + (cell[1] - other[1]) ** 2
                if seen[other] and squared < distance:
                    closest, distance = other, squared
            nearest.append(np.mean((patches[cell] - patches[closest]) ** 2))
    return float(np.mean(mean)), float(np.mean(nearest))


@pytest.mark.parametrize("target", [Pixels(), Pixels(norm_pix_loss=False), Brightness()], ids=["norm", "raw", "other"])
@pytest.mark.parametrize("mask_ratio", [0.3, 0.6, 0.8])
@pytest.mark.parametrize(
    ("channels", "height", "width", "patch_size"), [(3, 224, 224, 32), (1, 64, 160, 32), (5, 256, 192, 64)]
)
def test_trivial_losses_equal_loops(channels, height, width, patch_size, mask_ratio, target) -> None:
    images = torch.randn(3, channels, height, width, dtype=torch.float64)
    mask = RandomMask(mask_ratio=mask_ratio, patch_size=patch_size)(images)
    losses = trivial_losses(target, images, mask, patch_size)
    values = target(images, everything(mask)).unflatten(1, mask.grid).numpy()
    np.testing.assert_allclose(losses, naive_losses(values, mask.visible.numpy()), rtol=1e-12)


def test_ties_go_to_the_first_in_row_major_order() -> None:
    levels = torch.tensor([[7.0, 1, 9], [2, 0, 3], [8, 4, 6]])
    images = levels.repeat_interleave(32, 0).repeat_interleave(32, 1)[None, None]
    visible = torch.ones(1, 3, 3, dtype=torch.bool)
    visible[0, 1, 1] = False  # its neighbours 1, 2, 3, 4 are equally near
    assert trivial_losses(Pixels(norm_pix_loss=False), images, Mask(visible), 32).nearest == 1


def test_normalised_pixels_score_one_and_constant_patches_nothing() -> None:
    images = torch.randn(2, 3, 96, 96)
    mask = RandomMask()(images)
    mean = trivial_losses(Pixels(), images, mask, 32).mean
    assert mean == pytest.approx(1, abs=1e-3)
    images[1] = 0.3
    assert trivial_losses(Pixels(), images, mask, 32).mean == pytest.approx(0.5, abs=1e-3)


def test_trivial_losses_are_in_the_units_of_the_model_loss() -> None:
    class Zero(nn.Module):
        def forward(self, features: Tensor, mask: Mask, wanted: Mask) -> Tensor:
            return features.new_zeros(len(features), 32 * 32 * 3, wanted.index.shape[1], 1)

    model = create_model(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], image_size=96)
    model.decoder = Zero()
    images = torch.randn(2, 3, 96, 96)
    mask = model.masking(images)
    torch.testing.assert_close(trivial_losses(model.target, images, mask, 32).mean, model(images, mask).loss)


def test_trivial_losses_stay_precise() -> None:
    images = torch.randn(1, 3, 96, 96)
    mask = RandomMask()(images)
    exact = trivial_losses(Brightness(), images, mask, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert trivial_losses(Brightness(), images, mask, 32) == exact
    assert {loss.dtype for loss in trivial_losses(Brightness(), images.bfloat16(), mask, 32)} == {torch.float32}


@pytest.mark.parametrize(
    ("visible", "message"),
    [(torch.zeros(1, 3, 3), "shows 0 of 9"), (torch.ones(1, 3, 3), "shows 9 of 9"), (torch.eye(2)[None], "2x2")],
)
def test_trivial_losses_refuse_other_masks(visible, message) -> None:
    with pytest.raises(UserError, match=message):
        trivial_losses(Pixels(), torch.randn(1, 3, 96, 96), Mask(visible.bool()), 32)
