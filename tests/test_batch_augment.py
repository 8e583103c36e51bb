"""Erased rectangles, mixup and cutmix of a batch, and the loss that takes the mixed labels."""

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from fcmae import UserError
from fcmae.data.randomness import seeded
from fcmae.training.batch_augment import BatchAugment
from fcmae.training.classification_loss import ClassificationLoss, balanced_weights

CLASSES = 5


def augment(**options: float) -> BatchAugment:
    return BatchAugment(**{"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, **options})


def batch(size: int = 6, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator)
    return images, torch.arange(size) % CLASSES


def drawn(augmentation: BatchAugment, seed: int, **options: int) -> tuple[Tensor, Tensor]:
    images, labels = batch(**options)
    torch.manual_seed(seed)
    return augmentation(images, labels, CLASSES)


# -- mixup and cutmix --

KINDS = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "either": {"mixup": 0.8, "cutmix": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [16, 9])
def test_mixing_is_timms_under_the_same_seed(kind, side):
    options = KINDS[kind]
    for seed in range(10):
        images, shares = drawn(augment(**options), seed, side=side)
        torch.manual_seed(seed)
        with seeded(int(torch.randint(2**63 - 1, ()))):
            mix = Mixup(
                mixup_alpha=options.get("mixup", 0.0),
                cutmix_alpha=options.get("cutmix", 0.0),
                label_smoothing=0.0,
                num_classes=CLASSES,
            )
            wanted = mix(*batch(side=side))
        assert torch.equal(images, wanted[0])
        assert torch.equal(shares, wanted[1])


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_labels_are_the_shares_of_the_images(kind):
    """The formula: an image and its mirror in the batch, with the weight that both labels have."""
    plain, labels = batch()
    one_hot = torch.eye(CLASSES)[labels]
    kinds = set()
    for seed in range(30):
        images, shares = drawn(augment(**KINDS[kind]), seed)
        assert shares.shape == (6, CLASSES)
        assert shares.dtype == torch.float32
        assert torch.allclose(shares.sum(1), torch.ones(6))
        weight = float(shares[1, 1])  # image 1 is mixed with image 4; image 0 with 5, which has class 0 as well
        assert torch.allclose(shares, weight * one_hot + (1 - weight) * one_hot.flip(0), atol=1e-6)
        if weight in (0, 1):  # nothing to tell the kinds apart by
            continue
        kept = (images == plain).all(1)  # (B, H, W)
        if torch.allclose(images, weight * plain + (1 - weight) * plain.flip(0), atol=1e-5):
            kinds.add("mixup")
        else:
            kinds.add("cutmix")
            assert torch.equal(images, torch.where(kept[:, None], plain, plain.flip(0)))
            assert kept.float().mean((1, 2)).sub(weight).abs().max() < 1e-6
            hidden = ~kept[0]
            rows, columns = hidden.any(1).sum(), hidden.any(0).sum()
            assert int(hidden.sum()) == int(rows * columns)  # a rectangle
    assert kinds == ({"mixup", "cutmix"} if kind == "either" else {kind})


def test_alpha_spreads_the_shares():
    """Beta(a, a) has the variance 1 / (4 (2 a + 1))."""
    spread = {}
    for alpha in (0.2, 5.0):
        weights = torch.tensor([float(drawn(augment(mixup=alpha), seed, side=2)[1][1, 1]) for seed in range(400)])
        spread[alpha] = float(weights.var())
        wanted = 1 / (4 * (2 * alpha + 1))
        # of a distribution on [0, 1], the mean of (x - 1/2)^2 in [0, 1/4] errs by less than this, but once in a million
        assert abs(float(weights.sub(0.5).square().mean()) - wanted) < 0.25 * math.sqrt(math.log(2e6) / 800)
    assert spread[0.2] > 2 * spread[5.0]


def test_both_come_equally_often():
    plain, _ = batch()
    cut = 0
    for seed in range(200):
        images, _ = drawn(augment(mixup=0.8, cutmix=1.0), seed)
        cut += bool((images.unsqueeze(0) == torch.stack([plain, plain.flip(0)])).any(0).all())
    assert abs(cut - 100) < 5 * math.sqrt(200 / 4)  # five deviations


@pytest.mark.parametrize("shape", [(6,), (6, CLASSES)])
def test_off_means_unchanged(shape):
    images, _ = batch()
    labels = torch.zeros(shape, dtype=torch.int64)
    before = images.clone()
    changed, same = augment()(images, labels, CLASSES)
    assert torch.equal(changed, before)
    assert same is labels
    assert not augment(random_erasing=0.5).mixes
    assert augment(mixup=0.1).mixes
    assert augment(cutmix=0.1).mixes


def test_erasing_alone_keeps_labels_of_any_kind():
    labels = torch.rand(6, CLASSES)
    images, _ = batch()
    _, same = augment(random_erasing=1.0)(images, labels, CLASSES)
    assert same is labels


@pytest.mark.parametrize("options", [*KINDS.values(), {"random_erasing": 0.5}, {"random_erasing": 0.5, "mixup": 1.0}])
def test_batches_follow_from_torchs_seed_alone(options):
    results = []
    for others in (1, 2):
        random.seed(others)
        np.random.seed(others)  # noqa: NPY002
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        results.append([drawn(augment(**options), seed) for seed in range(4)])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
    for (images, labels), (same_images, same_labels) in zip(*results, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    first = [images for images, _ in results[0]]
    assert not any(torch.equal(first[0], other) for other in first[1:])


def test_the_next_batch_gets_other_numbers():
    torch.manual_seed(0)
    images = [augment(random_erasing=0.5, mixup=1.0)(*batch(), CLASSES)[0] for _ in range(3)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


# -- random erasing --


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_erasing_hits_the_share_asked_for_and_fills_with_noise(share):
    count, side = 800, 32
    torch.manual_seed(0)
    images, labels = augment(random_erasing=share)(torch.full((count, 3, side, side), 50.0), torch.zeros(count), 2)
    erased = (images != 50).any(1)  # (B, H, W)
    hit = erased.any(2).any(1)
    # five deviations; ten tries make all but certain that a rectangle fits
    assert abs(float(hit.float().mean()) - share) <= 5 * math.sqrt(share * (1 - share) / count)
    areas = erased[hit].float().mean((1, 2))
    assert float(areas.min()) > 0.01  # from a fiftieth on
    assert 0.25 < float(areas.max()) < 0.36  # a third, rounded to pixels
    for one in erased[hit]:
        assert int(one.sum()) == int(one.any(1).sum() * one.any(0).sum())  # one rectangle
    noise = images[images != 50]
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / len(noise))
    row = images[hit][0][:, erased[hit][0]]
    assert row.unique().numel() == row.numel()  # every pixel and channel by itself
    assert labels.eq(0).all()


def test_erasing_comes_before_mixing():
    """As in the published recipes: what is erased is mixed, not the mixture erased."""
    torch.manual_seed(0)
    images, shares = augment(random_erasing=1.0, mixup=1.0)(torch.full((2, 1, 32, 32), 50.0), torch.arange(2), 2)
    weight = float(shares[0, 0])
    assert 0.05 < weight < 0.95
    touched = (images - 50).abs()[:, 0] > 1e-3  # (B, H, W)
    assert torch.equal(touched[0], touched[1])  # each image shows both rectangles
    assert 0 < int(touched[0].sum()) < 32 * 32


# -- refusals --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_erasing": 1.1}, r"batch_augment.random_erasing=1.1 must be a share in \[0, 1\]"),
        ({"random_erasing": -0.1}, r"batch_augment.random_erasing=-0.1 must be a share in \[0, 1\]"),
        ({"random_erasing": math.nan}, r"batch_augment.random_erasing=nan must be a share in \[0, 1\]"),
        ({"mixup": -1.0}, "batch_augment.mixup=-1.0 must be a number from 0"),
        ({"cutmix": -0.5}, "batch_augment.cutmix=-0.5 must be a number from 0"),
    ],
)
def test_augmentations_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        augment(**options)
    assert re.fullmatch(message, str(caught.value)), caught.value


@pytest.mark.parametrize("options", [{"mixup": 0.1}, {"cutmix": 0.1}])
def test_batches_that_cannot_be_mixed_are_refused(options):
    with pytest.raises(UserError, match=r"data.batch_size=7 is odd.*make it even, or set .*mixup=0 .*cutmix=0"):
        augment(**options).check(batch_size=7, multi_label=False)
    with pytest.raises(UserError, match=r"mixup and cutmix need one label per image: set .*mixup=0 .*cutmix=0"):
        augment(**options).check(batch_size=8, multi_label=True)
    augment(**options).check(batch_size=8, multi_label=False)
    augment(random_erasing=0.5).check(batch_size=7, multi_label=True)


# -- the loss --


def logits(batch: int = 6, classes: int = CLASSES) -> Tensor:
    return (3 * torch.randn(batch, classes, dtype=torch.float64)).requires_grad_()


def same_loss_and_gradient(loss: ClassificationLoss, labels: Tensor, wanted: Any) -> None:
    """Against a formula in float64; the loss itself computes in float32."""
    mine = logits()
    its = mine.detach().clone().requires_grad_()
    value, formula = loss(mine, labels), wanted(its)
    assert value.dtype == torch.float32
    assert value.ndim == 0
    assert value.item() == pytest.approx(formula.item(), rel=1e-6)
    value.backward()
    formula.backward()
    assert mine.grad.abs().max() > 0.01
    assert (mine.grad - its.grad).abs().max() < 1e-6


def log_softmax(x: Tensor) -> Tensor:
    return x - x.exp().sum(1, keepdim=True).log()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_classes(smoothing, weighted):
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25]) if weighted else None
    factors = weights.double() if weights is not None else torch.ones(CLASSES, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    targets = (1 - smoothing) * torch.eye(CLASSES, dtype=torch.float64)[labels] + smoothing / CLASSES
    loss = ClassificationLoss(label_smoothing=smoothing, class_weights=weights, multi_label=False)
    # over the number of images, not the sum of their weights: so micro-batches add up to the batch that they are of
    same_loss_and_gradient(loss, labels, lambda x: -(targets * factors * log_softmax(x)).sum() / 6)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_mixed_labels(weighted):
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25]) if weighted else None
    factors = weights.double() if weights is not None else 1.0
    shares = torch.rand(6, CLASSES).softmax(1)
    loss = ClassificationLoss(label_smoothing=0.2, class_weights=weights, multi_label=False)
    targets = 0.8 * shares.double() + 0.2 / CLASSES
    same_loss_and_gradient(loss, shares, lambda x: -(targets * factors * log_softmax(x)).sum() / 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
def test_smoothing_mixed_labels_is_timms_soft_target_loss(smoothing, lam):
    """timm smooths before it mixes, this loss after; the recipes' numbers are timm's."""
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    smoothed = mixup_target(labels, CLASSES, lam=lam, smoothing=smoothing).double()
    loss = ClassificationLoss(label_smoothing=smoothing, class_weights=None, multi_label=False)
    mixed = mixup_target(labels, CLASSES, lam=lam, smoothing=0.0)
    same_loss_and_gradient(loss, mixed, lambda x: SoftTargetCrossEntropy()(x, smoothed))


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_of_several_labels(weighted):
    weights = torch.tensor([0.5, 2.0, 1.0, 30.0, 0.25]) if weighted else None
    factors = weights.double() if weights is not None else 1.0
    labels = (torch.rand(6, CLASSES) < 0.4).float()
    loss = ClassificationLoss(label_smoothing=0.0, class_weights=weights, multi_label=True)

    def formula(x: Tensor) -> Tensor:
        present, absent = (1 / (1 + (-x).exp())).log(), (1 / (1 + x.exp())).log()
        return -(labels * factors * present + (1 - labels) * absent).mean()

    same_loss_and_gradient(loss, labels, formula)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_loss_of_half_precision_is_computed_in_single(multi_label):
    loss = ClassificationLoss(label_smoothing=0.0, class_weights=None, multi_label=multi_label)
    labels = torch.rand(6, CLASSES).softmax(1)
    half = logits().detach().to(torch.bfloat16)
    assert loss(half, labels).item() == loss(half.float(), labels).item()


def test_class_weights_move_with_the_loss_but_are_not_saved():
    """A checkpoint of one data set's weights must load for another's."""
    loss = ClassificationLoss(label_smoothing=0.0, class_weights=torch.ones(3), multi_label=False)
    assert not loss.state_dict()
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize(
    ("smoothing", "multi_label", "message"),
    [
        (1.0, False, r"label_smoothing=1.0 must be a share in \[0, 1\)"),
        (-0.1, False, r"label_smoothing=-0.1 must be a share in \[0, 1\)"),
        (math.nan, False, r"label_smoothing=nan must be a share in \[0, 1\)"),
        (0.1, True, "label_smoothing=0.1 needs one label per image: set label_smoothing=0"),
    ],
)
def test_smoothings_are_refused(smoothing, multi_label, message):
    with pytest.raises(UserError) as caught:
        ClassificationLoss(label_smoothing=smoothing, class_weights=None, multi_label=multi_label)
    assert re.fullmatch(message, str(caught.value)), caught.value


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=50))
def test_balanced_weights_make_classes_count_the_same(counts):
    sizes = torch.tensor(counts)
    images = int(sizes.sum())
    weights = balanced_weights(sizes, images, multi_label=False)
    assert weights.dtype == torch.float32
    masses = weights.double() * sizes
    assert torch.allclose(masses, masses.mean(), rtol=1e-6)
    assert masses.sum().item() == pytest.approx(images, rel=1e-6)  # an image counts one on average


@given(images=st.integers(2, 5000), data=st.data())
def test_balanced_weights_of_several_labels_make_presence_count_like_absence(images, data):
    present = torch.tensor(data.draw(st.lists(st.integers(1, images), min_size=1, max_size=20)))
    weights = balanced_weights(present, images, multi_label=True)
    assert weights.dtype == torch.float32
    # A class that every image has counts as if one had it not: with a weight of 0 nothing would be learnt of it.
    assert torch.allclose(weights.double() * present, (images - present).clamp(min=1).double(), rtol=1e-6)


def test_balanced_weights_balance_the_gradient():
    """Of a network that knows nothing yet: the weighted loss pulls no class's logit up or down."""
    labels = torch.tensor([0] * 12 + [1] * 3 + [2])
    x = torch.zeros(16, 3, requires_grad=True)
    weights = balanced_weights(torch.bincount(labels), 16, multi_label=False)
    ClassificationLoss(label_smoothing=0.0, class_weights=weights, multi_label=False)(x, labels).backward()
    assert x.grad.sum(0).abs().max() < 1e-6
    several = (torch.arange(16)[:, None] < torch.tensor([12, 3, 1])).float()
    x = torch.zeros(16, 3, requires_grad=True)
    weights = balanced_weights(several.sum(0).long(), 16, multi_label=True)
    ClassificationLoss(label_smoothing=0.0, class_weights=weights, multi_label=True)(x, several).backward()
    assert x.grad.sum(0).abs().max() < 1e-6
