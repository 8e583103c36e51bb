"""Pictures for classification: evaluated exactly as timm does, and augmented from torch's seed alone."""

import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fcmae import UserError
from fcmae.data.classification_transforms import ClassificationAugment, evaluation_transform
from fcmae.data.picture import Decoded
from fcmae.data.randomness import seeded

POLICY = "rand-m9-mstd0.5-inc1"
OPTIONS: dict[str, Any] = {
    "crop_scale": [0.08, 1.0],
    "flip": True,
    "randaugment": POLICY,
    "color_jitter": 0.4,
    "mean": [0.485, 0.456, 0.406],
    "crop_pct": "auto",
}


def augment(**options: Any) -> ClassificationAugment:
    return ClassificationAugment(**{**OPTIONS, **options})


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture without two pixels alike, so that a shift by one shows."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def timms(size: tuple[int, int], crop_pct: float, crop_mode: str) -> Any:
    """timm's own evaluation transform, without the normalisation."""
    return create_transform(
        (3, *size),
        is_training=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        normalize=False,
    )


# -- to evaluate --

sides = st.integers(1, 90)


@settings(max_examples=60)
@given(size=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])), width=sides, height=sides)
@example(size=(64, 64), width=90, height=1)
@example(size=(64, 64), width=1, height=1)
@example(size=(64, 96), width=1, height=90)
@example(size=(32, 96), width=71, height=31)  # cut instead of rounded, the width would miss by a pixel
def test_below_384_pictures_are_cropped_as_timm_does(size, width, height):
    image = noise(width, height)
    wanted = timms(size, 0.875, "center")(image)
    assert wanted.shape == (3, *size)
    assert torch.equal(evaluation_transform(size)(Decoded(image)), wanted)


@settings(max_examples=20)
@given(crop_pct=st.sampled_from([0.5, 0.9, 0.95, 1.0, 1]), width=sides, height=sides)
def test_other_shares_are_cropped_as_timm_does(crop_pct, width, height):
    for size in ((64, 64), (32, 64)):
        image = noise(width, height, "L")
        assert torch.equal(evaluation_transform(size, crop_pct)(Decoded(image)), timms(size, crop_pct, "center")(image))


@settings(max_examples=5)
@given(width=st.integers(1, 500), height=st.integers(1, 500))
@example(width=500, height=1)
@example(width=384, height=384)
def test_from_384_on_pictures_are_warped_as_timm_does(width, height):
    image = noise(width, height)
    for size in ((384, 384), (384, 96), (96, 384)):
        wanted = timms(size, 1.0, "squash")(image)
        assert torch.equal(evaluation_transform(size)(Decoded(image)), wanted)
        assert torch.equal(
            evaluation_transform((32, 64), "warp")(Decoded(image)), timms((32, 64), 1.0, "squash")(image)
        )


@pytest.mark.parametrize(
    ("size", "crop_pct", "mode"),
    [
        ((383, 383), 0.875, "center"),
        ((384, 384), 1.0, "squash"),
        ((383, 384), 1.0, "squash"),
        ((224, 224), 0.875, "center"),
    ],
)
def test_the_rule_changes_at_384(size, crop_pct, mode):
    image = noise(200, 120)
    other = timms(size, *((1.0, "squash") if mode == "center" else (0.875, "center")))(image)
    result = augment().evaluate(size)(Decoded(image))
    assert torch.equal(result, timms(size, crop_pct, mode)(image))
    assert not torch.equal(result, other)


def test_the_share_given_is_the_share_cropped():
    image = noise(120, 80)
    for crop_pct in (1.0, 0.5):  # at 384, too
        for size in ((64, 64), (384, 384)):
            wanted = timms(size, crop_pct, "center")(image)
            assert torch.equal(augment(crop_pct=crop_pct).evaluate(size)(Decoded(image)), wanted)
    assert torch.equal(
        augment(crop_pct="warp").evaluate((64, 64))(Decoded(image)), timms((64, 64), 1.0, "squash")(image)
    )


# -- to train --


def draw(transform: Any, image: Image.Image, seed: int) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = transform(Decoded(image))
    return result


@pytest.mark.parametrize("randaugment", [POLICY, None])
@pytest.mark.parametrize(("mode", "mean"), [("RGB", [0.5, 0.4, 0.3]), ("L", [0.5])])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_training_pictures_follow_from_torchs_seed_alone(randaugment, mode, mean, size):
    transform = augment(randaugment=randaugment, mean=mean).train(size)
    image = noise(100, 80, mode)
    first = []
    for others in (1, 2):
        random.seed(others)
        np.random.seed(others)  # noqa: NPY002
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        first.append([draw(transform, image, seed) for seed in range(8)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
    assert all(torch.equal(one, other) for one, other in zip(*first, strict=True))
    assert len({tuple(picture.flatten().tolist()) for picture in first[0]}) == 8
    assert all(picture.dtype == torch.uint8 and picture.shape == (len(mean), *size) for picture in first[0])


def test_the_generators_are_put_back_after_an_error():
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def fail() -> None:
        with seeded(5):
            random.random()
            np.random.rand()  # noqa: NPY002
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_seeded_numbers_follow_from_the_seed_in_both_generators():
    def numbers(seed: int) -> tuple[float, float]:
        with seeded(seed):
            return random.random(), float(np.random.rand())  # noqa: NPY002

    assert numbers(3) == numbers(3)
    assert numbers(2**63 - 2) == numbers(2**63 - 2)  # wider than NumPy's seeds
    for mine, its in zip(numbers(3), numbers(4), strict=True):
        assert mine != its


WHOLE = {"crop_scale": [1.0, 1.0], "flip": False}


@pytest.mark.parametrize(("mode", "mean"), [("RGB", [0.5, 0.4, 0.3]), ("L", [0.5])])
def test_randaugment_changes_pictures(mode, mean):
    """As often as its description says: two operations, each with a chance of one half."""
    image = noise(64, 64, mode)
    policy = augment(mean=mean, **WHOLE).train((64, 64))
    plain = augment(mean=mean, randaugment=None, color_jitter=0.0, **WHOLE).train((64, 64))
    changed = sum(not torch.equal(draw(policy, image, seed), draw(plain, image, seed)) for seed in range(200))
    # Of 3/4 that get an operation, a few get one that changes nothing (AutoContrast of full contrast, for one);
    # from 1/2 to 3/4, and four deviations of sqrt(200) / 2 either way
    assert 100 - 28 <= changed <= 150 + 28


@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
def test_randaugment_is_timms_with_the_colours_and_shifts_of_its_own_recipe(size):
    """The policy, and what it is given, are those of timm's `create_transform` for training."""
    timm = create_transform(
        (3, *size), is_training=True, auto_augment=POLICY, interpolation="bicubic", mean=OPTIONS["mean"]
    )
    theirs = next(step for step in timm.transforms if type(step).__name__ == "RandAugment")
    for mine, its in zip(augment().train(size).transforms[1].transform.ops, theirs.ops, strict=True):
        assert (mine.name, mine.magnitude, mine.prob, mine.kwargs) == (its.name, its.magnitude, its.prob, its.kwargs)
        assert mine.hparams == its.hparams
    plain = augment(randaugment=None, color_jitter=0.0).train(size)
    image = noise(80, 90)
    different = 0
    for seed in range(40):
        picture = draw(augment().train(size), image, seed)
        cropped = draw(plain, image, seed)
        with seeded(int(torch.randint(2**63 - 1, ()))):  # what torch gives after the crop
            wanted = v2.functional.pil_to_tensor(theirs(v2.functional.to_pil_image(cropped)))
        assert torch.equal(picture, wanted)
        different += not torch.equal(picture, cropped)
    assert different > 10


def test_the_highest_severity_is_drawn_too():
    """Posterize keeps no bits there, which Pillow refuses from version 13 on."""
    policy = augment(randaugment="rand-m10-inc1-n8-p1.0", **WHOLE).train((64, 64))
    ops = [op for op in policy.transforms[1].transform.ops if op.name.startswith("Posterize")]
    assert ops
    assert all(not np.asarray(op(noise(8, 8))).any() for op in ops)
    for seed in range(20):
        assert draw(policy, noise(64, 64), seed).shape == (3, 64, 64)


def test_what_a_shift_uncovers_is_filled_with_the_mean():
    """Of three channels and of one."""
    for mode, mean, fill in (("RGB", [1.0, 0.5, 0.0], [255, 128, 0]), ("L", [0.25], [64])):
        transform = augment(mean=mean, randaugment="rand-m9-n4-p1.0", **WHOLE).train((64, 64))
        policy = transform.transforms[1].transform
        shifts = [op for op in policy.ops if op.name in ("TranslateXRel", "ShearX", "Rotate")]
        assert len(shifts) == 3
        for op in shifts:
            shifted = np.asarray(op(noise(64, 64, mode))).reshape(64 * 64, -1)
            assert (shifted == fill).all(1).mean() > 0.02


def test_colours_are_jittered_only_without_randaugment():
    image = Image.new("RGB", (64, 64), (40, 100, 200))
    jittered = augment(randaugment=None, **WHOLE).train((64, 64))
    colours = {tuple(draw(jittered, image, seed)[:, 0, 0].tolist()) for seed in range(20)}
    assert len(colours) > 15
    still = augment(randaugment=None, color_jitter=0.0, **WHOLE).train((64, 64))
    assert {tuple(draw(still, image, seed)[:, 0, 0].tolist()) for seed in range(20)} == {(40, 100, 200)}
    # a policy of no operation leaves the colours alone, whatever the jitter is
    policy = augment(randaugment="rand-m9-n0", color_jitter=0.9, **WHOLE).train((64, 64))
    assert {tuple(draw(policy, image, seed)[:, 0, 0].tolist()) for seed in range(20)} == {(40, 100, 200)}


def test_one_channel_is_not_jittered():
    image = Image.new("L", (64, 64), 77)
    transform = augment(randaugment=None, mean=[0.5], **WHOLE).train((64, 64))
    assert {int(draw(transform, image, seed)[0, 0, 0]) for seed in range(10)} == {77}


@pytest.mark.parametrize("strength", [0.1, 0.4])
def test_brightness_stays_within_its_strength(strength):
    grey = Image.new("RGB", (32, 32), (100, 100, 100))  # contrast and saturation leave it alone
    transform = augment(randaugment=None, color_jitter=strength, **WHOLE).train((32, 32))
    values = [int(draw(transform, grey, seed)[0, 0, 0]) for seed in range(100)]
    assert 100 - 100 * strength - 1 <= min(values) < 100 - 80 * strength  # 0.9**100 not to come so near
    assert 100 + 80 * strength < max(values) <= 100 + 100 * strength + 1


def test_brightness_contrast_and_saturation_are_changed_but_not_the_hue():
    image = noise(64, 64)
    transform = augment(randaugment=None, color_jitter=0.3, **WHOLE).train((64, 64))
    plain = augment(randaugment=None, color_jitter=0.0, **WHOLE).train((64, 64))
    jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)
    for seed in range(5):
        picture = draw(transform, image, seed)
        assert torch.equal(picture, jitter(draw(plain, image, seed)))  # what torch draws after the crop


@pytest.mark.parametrize("randaugment", [POLICY, None])
def test_training_crops_and_flips_obey(randaugment):
    ramp = Image.fromarray(np.tile(np.linspace(60, 200, 64).astype(np.uint8), (64, 1))).convert("RGB")
    options = {"randaugment": randaugment and "rand-m9-n0", "color_jitter": 0.0}
    transform = augment(crop_scale=[0.3, 0.3], flip=True, **options).train((64, 64))
    pictures = [draw(transform, ramp, seed).float() for seed in range(60)]
    rising = sum(bool(picture[0, 0, -1] > picture[0, 0, 0]) for picture in pictures)
    assert 10 < rising < 50  # missed once in 10 million
    spans = [float(picture.amax() - picture.amin()) / 140 for picture in pictures]
    assert max(spans) < 0.7  # sqrt(0.3 * 4/3) of the width, and the overshoot of bicubic
    assert min(spans) < 0.55
    whole = augment(**WHOLE, **options).train((64, 64))
    assert all(bool(picture[0, 0, -1] > picture[0, 0, 0]) for picture in (draw(whole, ramp, s) for s in range(20)))


# -- refusals --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": [1.0, 0.2]}, r"augment.crop_scale=\[1.0, 0.2\] must be two rising shares in \(0, 1\].*"),
        ({"color_jitter": -0.1}, "augment.color_jitter=-0.1 must be a number from 0"),
        ({"crop_pct": 0.0}, r"augment.crop_pct=0.0 must be a share in \(0, 1\], auto or warp"),
        ({"crop_pct": 1.01}, "augment.crop_pct=1.01 must be a share .*"),
        ({"crop_pct": float("nan")}, "augment.crop_pct=nan must be a share .*"),
        ({"crop_pct": "squash"}, "augment.crop_pct='squash' must be a share .*"),
        ({"mean": [0.5] * 4}, "augment.randaugment=.* works on 1 or 3 channels, not 4: set augment.randaugment=null"),
        ({"randaugment": "m9"}, "augment.randaugment=m9 is no policy: write it as rand-m9-mstd0.5-inc1"),
        ({"randaugment": ""}, "augment.randaugment= is no policy: write it as .*"),
        ({"randaugment": "random-m9"}, "augment.randaugment=random-m9 is no policy .*: write it as .*"),
        ({"randaugment": "rand-z9"}, "augment.randaugment=rand-z9 is no policy .*Unknown.*: write it as .*"),
        ({"randaugment": "rand-m9.5"}, "augment.randaugment=rand-m9.5 is no policy .*: write it as .*"),
    ],
)
def test_augmentations_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        augment(**options)
    assert re.fullmatch(message, str(caught.value)), caught.value


def test_more_channels_do_without_randaugment():
    augment(mean=[0.5] * 4, randaugment=None).train((64, 64))


def test_a_share_is_checked_wherever_it_is_given():
    with pytest.raises(UserError, match="must be a share"):
        evaluation_transform((64, 64), 1.5)


# -- workers --


@pytest.mark.parametrize("options", [{}, {"randaugment": None}, {"crop_pct": "warp"}, {"crop_pct": 0.9}])
def test_transforms_can_be_sent_to_workers_that_are_spawned(options):
    image = noise(50, 40)
    for transform in (augment(**options).train((64, 64)), augment(**options).evaluate((64, 64))):
        sent = pickle.loads(pickle.dumps(transform))
        assert torch.equal(draw(sent, image, 3), draw(transform, image, 3))


@pytest.mark.parametrize("mode", ["PIL", "tensor"])
@pytest.mark.parametrize(("height", "width"), [(1, 16_000), (16_000, 1), (3, 5_000)])
def test_a_strip_takes_no_more_memory_than_its_crop_needs(height, width, mode, monkeypatch):
    """Enlarged as a whole, 16000 x 1 pixels would be 1 million x 256."""
    ramp = np.broadcast_to(np.linspace(0, 255, max(height, width)), (min(height, width), max(height, width)))
    ramp = np.ascontiguousarray(ramp.T if height > width else ramp).astype(np.uint8)
    picture = Decoded(Image.fromarray(ramp) if mode == "PIL" else torch.from_numpy(ramp)[None])
    largest = 0
    resize_pil, resize = Image.Image.resize, F.resize

    def watched_pil(image: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize_pil(image, size, *rest)

    def watched(image: Tensor, size: list[int], *rest: Any, **options: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", watched_pil)
    monkeypatch.setattr("fcmae.data.classification_transforms.F.resize", watched)
    found = evaluation_transform((64, 64))(picture)
    assert found.shape == (1, 64, 64)
    assert 0 < largest <= 257 * 64 * 73
    assert (found.float() - 127.5).abs().max() <= 2  # what is in the middle of the ramp
