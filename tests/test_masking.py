"""Masks: how many patches are seen, which, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fcmae import Mask, RandomMask, UserError
from fcmae.masking import patch_grid, uniform


def images(batch: int, h: int, w: int, patch_size: int = 32) -> torch.Tensor:
    return torch.zeros(1, 1, 1, 1).expand(batch, 3, h * patch_size, w * patch_size)


@given(
    batch=st.integers(1, 4),
    h=st.integers(1, 12),
    w=st.integers(2, 12),
    ratio=st.floats(0, 1, exclude_max=True),
    patch_size=st.sampled_from([32, 64]),
)
def test_every_image_sees_int_of_the_rest(batch, h, w, ratio, patch_size):
    seen = int(h * w * (1 - ratio))
    masking = RandomMask(mask_ratio=ratio, patch_size=patch_size)
    if seen == 0:
        with pytest.raises(UserError, match=f"none of {h * w} patches"):
            masking(images(batch, h, w, patch_size))
        return
    mask = masking(images(batch, h, w, patch_size))
    assert mask.grid == (h, w)
    assert mask.visible.dtype == torch.bool
    assert mask.visible.flatten(1).sum(1).tolist() == [seen] * batch
    assert torch.equal(mask.index, Mask(mask.visible).index)


@pytest.mark.parametrize(("side", "seen"), [(224, 19), (256, 25), (384, 57)])
def test_the_papers_ratio(side, seen):
    assert RandomMask()(torch.zeros(2, 3, side, side)).index.shape == (2, seen)


@given(st.data())
def test_the_index_lists_the_seen_cells_row_by_row(data):
    batch, h, w = (data.draw(st.integers(1, 5)) for _ in range(3))
    seen = data.draw(st.integers(0, h * w))
    cells = [sorted(data.draw(st.permutations(range(h * w)))[:seen]) for _ in range(batch)]
    visible = torch.tensor([[cell in chosen for cell in range(h * w)] for chosen in cells]).view(batch, h, w)
    mask = Mask(visible)
    assert mask.index.dtype == torch.int64
    assert mask.index.tolist() == cells
    rows, columns = mask.rows_and_columns
    assert visible[torch.arange(batch)[:, None], rows, columns].all()


def test_the_seed_decides_the_masks():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(RandomMask()(images(4, 7, 7)).visible)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])  # the images of a batch differ


@given(seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), h=st.integers(1, 5), w=st.integers(2, 5))
def test_an_images_mask_follows_from_its_seed_alone(seeds, h, w):
    """Neither the batch nor torch's generator plays a part."""
    masking = RandomMask(mask_ratio=0.5)
    together = masking(images(len(seeds), h, w), torch.tensor(seeds))
    for place, seed in enumerate(seeds):
        torch.manual_seed(place)
        alone = masking(images(1, h, w), torch.tensor([seed]))
        assert torch.equal(alone.visible[0], together.visible[place])
        assert torch.equal(alone.index[0], together.index[place])


def test_random_numbers_are_splitmix64s():
    """Vigna's splitmix64.c, in Python's integers."""

    def reference(seed: int, count: int) -> list[float]:
        found = []
        for place in range(1, count + 1):
            z = (seed + place * 0x9E3779B97F4A7C15) % 2**64
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
            found.append(((z ^ (z >> 31)) >> 40) / 2**24)
        return found

    assert reference(1234567, 3) == [
        value / 2**24 for value in (6457827717110365317 >> 40, 3203168211198807973 >> 40, 9817491932198370423 >> 40)
    ]
    seeds = [0, 1, 1234567, 2**63 - 1, 2**40 + 7]  # so that each of the mixing steps shows
    assert uniform(torch.tensor(seeds), 50).tolist() == [reference(seed, 50) for seed in seeds]


def test_neighbouring_seeds_give_unrelated_numbers():
    numbers = uniform(torch.arange(20_000), 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    across = torch.corrcoef(numbers.T) - torch.eye(8)  # between cells, over seeds; a deviation is 0.007
    along = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert across.abs().max() < 0.035
    assert abs(along) < 0.0125


def test_patches_are_hidden_uniformly():
    """With 2 of 6 seen there are 15 masks, all equally likely; so are a larger grid's cells."""
    visible = RandomMask(mask_ratio=0.6)(images(30_000, 2, 3)).visible.flatten(1)
    kinds = (visible * 2 ** torch.arange(6)).sum(1).unique(return_counts=True)[1]
    assert len(kinds) == 15
    assert stats.chisquare(kinds.numpy()).pvalue > 1e-3

    visible = RandomMask(mask_ratio=0.6)(images(20_000, 7, 7)).visible.flatten(1).float()
    share = 19 / 49
    deviation = (visible.mean(0) - share) / (share * (1 - share) / 20_000) ** 0.5  # (49,), standard normal
    assert deviation.abs().max() < 4.5
    assert 0.5 < deviation.square().mean() < 1.6


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.tensor([[[True, False]], [[True, True]]]), r"different numbers of patches \(1 to 2\)"),
        (torch.ones(1, 2, 2), r"boolean tensor \(B, h, w\).*torch.float32 \(1, 2, 2\)"),
        (torch.ones(2, 2, dtype=torch.int64), r"torch.int64 \(2, 2\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"torch.bool \(2, 4\)"),
    ],
)
def test_what_is_no_mask_is_refused(visible, message):
    with pytest.raises(UserError, match=message):
        Mask(visible)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_a_ratio_out_of_bounds_is_refused(ratio):
    with pytest.raises(UserError, match=rf"mask_ratio={ratio} is outside \[0, 1\)"):
        RandomMask(mask_ratio=ratio)


@pytest.mark.parametrize("patch_size", [0, 16, 33, 48, -32])
def test_a_patch_that_is_no_multiple_of_the_stride_is_refused(patch_size):
    with pytest.raises(UserError, match=f"patch_size={patch_size} is not a multiple of 32"):
        RandomMask(patch_size=patch_size)


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "message"),
    [
        (225, 224, 32, "225x224 is not a multiple of the 32-pixel mask patch: instead of 225 use 224 or 256"),
        (224, 100, 32, "224x100 .* instead of 100 use 96 or 128"),
        (224, 224, 64, "224x224 .* the 64-pixel mask patch: instead of 224 use 192 or 256"),
        (20, 32, 32, "20x32 .* instead of 20 use 32"),
        (0, 32, 32, "0x32 .* instead of 0 use 32"),
    ],
)
def test_an_image_that_is_no_multiple_of_the_patch_is_refused(height, width, patch_size, message):
    with pytest.raises(UserError, match=message):
        patch_grid(height, width, patch_size)
    with pytest.raises(UserError, match=message):
        RandomMask(patch_size=patch_size)(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("patches", [2, 4, 49, 144])
def test_the_suggested_ratio_works(patches):
    with pytest.raises(UserError, match=rf"mask_ratio=0.999 leaves none of {patches} patches visible") as refusal:
        RandomMask(mask_ratio=0.999).visible_count(patches)
    bound = float(str(refusal.value).partition("use a ratio below ")[2].split()[0])
    assert RandomMask(mask_ratio=bound - 1e-3).visible_count(patches) == 1


def test_a_mask_on_another_device_is_the_same_mask():
    mask = RandomMask()(images(2, 3, 3)).to("meta")
    assert mask.visible.device.type == mask.index.device.type == "meta"
    assert (mask.grid, mask.index.shape) == ((3, 3), (2, 3))
