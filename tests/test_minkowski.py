"""MinkowskiEngine, the original's library, computes what the engine `torch` does: in float64, gradients included."""

import collections
import importlib
import sys

import pytest
import torch

import fcmae
from fcmae import UserError
from fcmae.engines.torch import depthwise as reference

try:
    from fcmae.engines.minkowski import depthwise
except UserError as error:
    lacking = str(error)  # names the command that installs it
else:
    lacking = ""
needs_minkowski = pytest.mark.skipif(bool(lacking), reason=lacking)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# patches (h, w), seen, batch, channels, kernel, bias
CASES = [
    ((3, 5), 6, 3, 3, 7, True),
    ((5, 3), 4, 1, 40, 7, True),
    ((4, 2), 1, 2, 3, 7, False),
    ((1, 1), 1, 1, 3, 7, True),
    ((3, 3), 9, 2, 3, 3, True),
    ((2, 3), 6, 1, 40, 7, False),
]


@needs_minkowski
@pytest.mark.parametrize("p", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("grid", "seen", "batch", "channels", "k", "with_bias"), CASES)
def test_equals_the_engine_torch(grid, seen, batch, channels, k, with_bias, p, draw_mask):
    mask = draw_mask(batch, *grid, seen)
    x = torch.randn(batch, channels, seen * p, p, dtype=torch.float64)
    x[:, :, 0, 0] = 0  # the original lost positions like this one
    inputs = [x, torch.randn(channels, 1, k, k, dtype=torch.float64)]
    inputs += [torch.randn(channels, dtype=torch.float64)] if with_bias else []
    check(inputs, mask)


@needs_minkowski
def test_takes_any_memory_layout(draw_mask):
    x = torch.randn(2, 24, 4, 10, dtype=torch.float64)[..., ::2].permute(0, 3, 1, 2)  # (B, C, V*p, p), every other one
    weight = torch.randn(7, 7, 1, 5, dtype=torch.float64).permute(3, 2, 1, 0)
    check([x, weight], draw_mask(2, 3, 4, 6))
    check([x.contiguous(memory_format=torch.channels_last), weight], draw_mask(2, 3, 4, 6))


def check(inputs, mask):
    x, weight, bias = [tensor.requires_grad_() for tensor in inputs] + [None] * (3 - len(inputs))
    ours, theirs = depthwise(x, weight, bias, mask), reference(x, weight, bias, mask)
    assert_same([ours], [theirs])
    assert ours.is_contiguous(memory_format=torch.channels_last)  # as a packed image is
    probe = torch.randn_like(theirs)
    assert_same(torch.autograd.grad(ours, inputs, probe), torch.autograd.grad(theirs, inputs, probe))


@needs_minkowski
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_under_autocast_it_computes_in_float32_and_returns_the_type_of_torch(dtype, draw_mask):
    mask, weight = draw_mask(2, 3, 3, 4), torch.randn(8, 1, 7, 7).to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 8, 16, 4).to(dtype).requires_grad_()
    exact = depthwise(x.to(weight.dtype), weight, None, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = depthwise(x, weight, None, mask), reference(x, weight, None, mask)
    assert y.dtype == theirs.dtype
    assert torch.equal(y, exact.to(y.dtype))  # rounded once, at the end
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


@needs_minkowski
def test_leaves_random_numbers_and_threads_alone(draw_mask):
    mask, state, threads = draw_mask(1, 2, 2, 1), torch.get_rng_state(), torch.get_num_threads()
    depthwise(torch.zeros(1, 3, 8, 8), torch.zeros(3, 1, 7, 7), None, mask)
    assert torch.equal(torch.get_rng_state(), state)  # so the masks are those of every other engine
    assert torch.get_num_threads() == threads == 1


@needs_minkowski
def test_a_device_that_the_build_lacks_is_refused(draw_mask):
    with pytest.raises(UserError, match="built for the CPU, not for meta"):
        depthwise(torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(3, 1, 7, 7), None, draw_mask(1, 2, 2, 1))


@needs_minkowski
def test_a_whole_model_has_the_same_loss_and_gradients(randomise, draw_mask):
    options = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 40), "decoder_dim": 16, "image_size": (96, 160)}
    theirs = randomise(fcmae.create_model(**options, engine="torch")).double()
    ours = fcmae.create_model(**options, engine="minkowski").double()
    ours.load_state_dict(theirs.state_dict())

    images, mask = torch.randn(2, 3, 96, 160, dtype=torch.float64), draw_mask(2, 3, 5, 6)
    losses = [model(images, mask).loss for model in (ours, theirs)]
    assert_same(losses[:1], losses[1:])
    gradients = [
        torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])
        for loss, model in zip(losses, (ours, theirs), strict=True)
    ]
    assert_same(*gradients)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    monkeypatch.delitem(sys.modules, "fcmae.engines.minkowski", raising=False)
    with pytest.raises(UserError, match=r"fcmae\[minkowski\].*docs/engines\.md") as caught:
        importlib.import_module("fcmae.engines.minkowski")
    assert len(str(caught.value).splitlines()) == 1
    assert not hasattr(collections, "Sequence")  # which the package needs while it is imported
