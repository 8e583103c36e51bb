"""Packing and unpacking: each other's inverse and each other's adjoint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcmae import Mask, UserError
from fcmae.packing import pack, unpack

layouts = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "channels": st.integers(1, 4),
        "h": st.integers(1, 4),
        "w": st.integers(1, 4),
        "p": st.sampled_from([1, 2, 4]),
        "share": st.floats(0, 1),
        "channels_last": st.booleans(),
    }
)


def example(layout, draw_mask):
    """A full map, a packed image and the mask that connects them."""
    batch, channels, h, w, p = (layout[key] for key in ("batch", "channels", "h", "w", "p"))
    seen = max(1, round(layout["share"] * h * w))
    format = torch.channels_last if layout["channels_last"] else torch.contiguous_format
    full = torch.randn(batch, channels, h * p, w * p, dtype=torch.float64).contiguous(memory_format=format)
    packed = torch.randn(batch, channels, seen * p, p, dtype=torch.float64).contiguous(memory_format=format)
    return full, packed, draw_mask(batch, h, w, seen)


@given(layouts)
def test_pack_stacks_the_seen_patches_in_order(draw_mask, layout):
    full, _, mask = example(layout, draw_mask)
    p, packed = layout["p"], pack(full, mask)
    for b, visible in enumerate(mask.visible):
        for place, (r, c) in enumerate(visible.nonzero().tolist()):
            patch = full[b, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
            assert torch.equal(packed[b, :, place * p : (place + 1) * p], patch)
    assert packed.shape[2:] == (mask.index.shape[1] * p, p)


@given(layouts)
def test_they_are_inverse_and_hidden_places_become_zero(draw_mask, layout):
    full, packed, mask = example(layout, draw_mask)
    p = layout["p"]
    seen = mask.visible.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]
    assert torch.equal(pack(unpack(packed, mask), mask), packed)
    assert torch.equal(unpack(pack(full, mask), mask), full * seen)


@given(layouts)
def test_they_are_adjoint(draw_mask, layout):
    full, packed, mask = example(layout, draw_mask)
    left, right = (pack(full, mask) * packed).sum(), (full * unpack(packed, mask)).sum()
    assert torch.isclose(left, right, rtol=1e-12, atol=1e-12)


@given(layouts)
def test_memory_is_channels_last(draw_mask, layout):
    full, packed, mask = example(layout, draw_mask)
    assert pack(full, mask).is_contiguous(memory_format=torch.channels_last)
    assert unpack(packed, mask).is_contiguous(memory_format=torch.channels_last)


def test_gradients(draw_mask):
    mask = draw_mask(2, 2, 3, 2)
    full = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    for function, x in ((pack, full), (unpack, packed)):
        assert torch.autograd.gradcheck(function, (x, mask))
        assert torch.autograd.gradgradcheck(function, (x, mask))


def test_the_type_stays():
    mask = Mask(torch.tensor([[[True, False]]]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.uint8):
        full = torch.ones(1, 3, 32, 64, dtype=dtype)
        assert pack(full, mask).dtype == unpack(pack(full, mask), mask).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((3, 1, 64, 96), "batch of 3 of size 64x96"),  # other batch
        ((2, 1, 65, 96), "batch of 2 of size 65x96"),  # no multiple
        ((2, 1, 64, 97), "batch of 2 of size 64x97"),
        ((2, 1, 96, 64), "batch of 2 of size 96x64"),  # height and width exchanged: patches would not be square
        ((2, 1, 64, 48), "batch of 2 of size 64x48"),
    ],
)
def test_what_does_not_fit_the_mask_is_refused(shape, size, draw_mask):
    with pytest.raises(UserError, match=f"{size} does not fit the mask's 2 grids of 2x3 square patches"):
        pack(torch.zeros(shape), draw_mask(2, 2, 3, 4))
