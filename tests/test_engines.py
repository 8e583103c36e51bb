"""Every engine computes the same: outputs and all gradients against plain formulas on the full map, in float64."""

import copy
import importlib.util
import pickle
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fcmae
from fcmae.engines import NAMES, auto, cpu, get_engine, native
from fcmae.engines.check import errors
from fcmae.engines.cpu import SOURCE, Kernels
from fcmae.errors import UserError

KNOWN = get_engine("cpu")
ENGINES = ["torch", "cpu"]  # triton and minkowski have files of their own
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def plain_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: fcmae.Mask) -> Tensor:
    """Position by position on the full map, without anything of the package."""
    (batch, h, w), p = mask.visible.shape, x.shape[3]
    full = x.new_zeros(batch, x.shape[1], h * p, w * p)
    places = [
        (b, slot, np.s_[b, :, r * p : (r + 1) * p, c * p : (c + 1) * p])
        for b in range(batch)
        for slot, (r, c) in enumerate(mask.visible[b].nonzero().tolist())
    ]
    for b, slot, where in places:
        full[where] = x[b, :, slot * p : (slot + 1) * p]
    full = F.conv2d(full, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    return torch.stack([torch.cat([full[where] for b, _, where in places if b == image], 1) for image in range(batch)])


def plain_gelu_grn_linear(
    x: Tensor, grn_weight: Tensor, grn_bias: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    h = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    norm = h.square().sum(1, keepdim=True).sqrt()
    y = grn_weight * (h * norm / (norm.mean(2, keepdim=True) + 1e-6)) + grn_bias + h
    return F.linear(y, weight, bias)


def compare(ours, plain, inputs: list[Tensor | None], dtype: torch.dtype) -> None:
    """Outputs and gradients, each relative to its largest element; inputs are rounded to `dtype` for both."""
    given = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    y, expected = ours(*given), plain(*exact)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    probe = torch.randn_like(expected).to(dtype)
    chosen = [number for number, x in enumerate(given) if x is not None]
    results = torch.autograd.grad(y, [given[n] for n in chosen], probe)
    references = torch.autograd.grad(expected, [exact[n] for n in chosen], probe.double())
    for number, a, b in zip(["output", *chosen], [y, *results], [expected, *references], strict=True):
        assert (a.double() - b).abs().max() <= BOUND[dtype] * b.abs().max(), number


# patches (h, w), seen, batch, channels, kernel, bias
CASES = [
    ((3, 5), 6, 2, 3, 7, True),
    ((4, 1), 1, 1, 40, 7, True),
    ((2, 3), 6, 2, 96, 7, False),  # all visible
    ((7, 7), 19, 1, 17, 7, True),
    ((3, 3), 4, 1, 5, 3, True),
]


EXACT = [torch.float64, torch.float32]  # in half precision, torch's own convolution is not ours to test


@pytest.mark.parametrize(("engine", "dtype"), [("cpu", d) for d in BOUND] + [("torch", d) for d in EXACT], ids=str)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_depthwise(case, p, engine, dtype, draw_mask):
    grid, seen, batch, channels, k, with_bias = case
    mask = draw_mask(batch, *grid, seen)
    inputs = [torch.randn(batch, channels, seen * p, p), torch.randn(channels, 1, k, k) / k]
    inputs += [torch.randn(channels) if with_bias else None]
    compare(
        lambda x, w, b: get_engine(engine).depthwise(x, w, b, mask),
        lambda x, w, b: plain_depthwise(x, w, b, mask),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("channels", [352, 2816])
@pytest.mark.parametrize("p", [1, 4])
def test_depthwise_of_wide_stages(channels, p, draw_mask):
    mask = draw_mask(1, 3, 4, 5)
    inputs = [torch.randn(1, channels, 5 * p, p), torch.randn(channels, 1, 7, 7), torch.randn(channels)]
    compare(
        lambda x, w, b: get_engine("cpu").depthwise(x, w, b, mask),
        lambda x, w, b: plain_depthwise(x, w, b, mask),
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 12, 3), (1, 1, 20, 4), (3, 130, 40, 10), (1, 65, 384, 96)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_gelu_grn_linear(engine, shape, dtype):
    batch, positions, channels, width = shape
    inputs = [3 * torch.randn(batch, positions, channels), torch.randn(channels), torch.randn(channels)]
    inputs += [torch.randn(width, channels) / channels**0.5, torch.randn(width)]
    compare(get_engine(engine).gelu_grn_linear, plain_gelu_grn_linear, inputs, dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_types_under_autocast(engine, draw_mask):
    engine, mask = get_engine(engine), draw_mask(2, 2, 2, 2)
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        x = torch.randn(2, 8, 8, 4, dtype=dtype, requires_grad=True)
        vectors = [torch.ones(8, dtype=dtype, requires_grad=True) for _ in range(2)]
        kernel, matrix = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((8, 1, 7, 7), (4, 8)))
        with torch.autocast("cpu", torch.bfloat16):
            y = engine.depthwise(x, kernel, None, mask)
            z = engine.gelu_grn_linear(x.flatten(2).mT, *vectors, matrix, None)
        assert y.dtype == z.dtype == expected
        leaves = [x, *vectors, kernel, matrix]
        assert {g.dtype for g in torch.autograd.grad(y.sum() + z.sum(), leaves)} == {dtype}


@pytest.mark.parametrize("engine", ENGINES)
def test_gelu_far_out_and_at_zero(engine):
    x = torch.tensor([-1e30, -40, -13.5, -13, -12.9, -6, -1e-30, -0.0, 0, 1e-30, 6, 13, 40, 1e18])
    x = x.view(1, -1, 1).expand(1, -1, 4).contiguous().requires_grad_()
    y = get_engine(engine).gelu_grn_linear(x, torch.zeros(4), torch.zeros(4), torch.eye(4), None)
    torch.testing.assert_close(y, F.gelu(x), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(F.gelu(x.double()).sum(), x)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-6, atol=1e-6)


def test_gelu_of_engine_cpu():
    """Value and slope, everywhere; torch's own, in float32, is up to 1.2e-6 off."""
    get_engine("cpu")
    kernels, ones, zeros = Kernels(), torch.ones(1, 16), torch.zeros(1, 16)
    x = torch.linspace(-15, 15, 2**20).view(1, -1, 16)
    exact = x.double().requires_grad_()
    value = F.gelu(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    gradient = torch.ones_like(x)
    kernels.gelu_scale_backward_(gradient, x, ones, zeros)
    assert (kernels.gelu_scale(x, ones, zeros[0]) - value).abs().max() < 5e-7
    assert (gradient - slope).abs().max() < 5e-7


def test_what_is_not_a_number_stays_so(draw_mask):
    for dtype in BOUND:
        x = torch.zeros(1, 4, 8, 2, dtype=dtype)
        x[0, 1, 0, 0] = torch.nan
        y = get_engine("cpu").depthwise(x, torch.ones(4, 1, 7, 7), None, draw_mask(1, 2, 3, 4))
        assert y[0, 1, 0, 0].isnan()
        assert not y[0, [0, 2, 3]].any()
        y = get_engine("cpu").gelu_grn_linear(
            x.view(1, 4, 16), *(torch.ones(16, dtype=dtype),) * 2, torch.eye(16, dtype=dtype), None
        )
        assert y.isnan().any()


@given(data=st.data())
@settings(max_examples=40)
def test_engine_cpu_whatever_the_shape(data, draw_mask):
    h, w, batch = (data.draw(st.integers(1, 5), name) for name in ("h", "w", "batch"))
    p, channels = data.draw(st.integers(1, 17), "p"), data.draw(st.integers(1, 70), "channels")
    seen, k = data.draw(st.integers(1, h * w), "seen"), data.draw(st.sampled_from([1, 3, 5, 7, 9]), "k")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    mask = draw_mask(batch, h, w, seen)
    inputs = [torch.randn(batch, channels, seen * p, p), torch.randn(channels, 1, k, k), torch.randn(channels)]
    compare(
        lambda x, w, b: get_engine("cpu").depthwise(x, w, b, mask),
        lambda x, w, b: plain_depthwise(x, w, b, mask),
        inputs,
        torch.float64,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_gradcheck(engine, draw_mask):
    engine, mask = get_engine(engine), draw_mask(2, 2, 3, 3)
    leaf = {"dtype": torch.float64, "requires_grad": True}
    inputs = torch.randn(2, 3, 6, 2, **leaf), torch.randn(3, 1, 7, 7, **leaf), torch.randn(3, **leaf)
    assert torch.autograd.gradcheck(lambda *x: engine.depthwise(*x, mask), inputs)
    inputs = torch.randn(2, 3, 5, **leaf), *(torch.randn(5, **leaf) for _ in range(2)), torch.randn(4, 5, **leaf)
    assert torch.autograd.gradcheck(engine.gelu_grn_linear, (*inputs, torch.randn(4, **leaf)))


def test_the_operators_are_what_torch_expects(draw_mask):
    get_engine("cpu")
    mask, tokens, x = draw_mask(2, 2, 3, 3), torch.randn(2, 3, 2, 2, 5), torch.randn(2, 4, 5)
    weight, bias = torch.randn(5, 1, 7, 7), torch.randn(5)
    norm = torch.rand(2, 5)
    ops = torch.ops.fcmae
    convolution = (tokens.clone().requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    for operator, arguments in [
        (ops.cpu_depthwise, (*convolution, mask.index, mask.slots)),
        (ops.cpu_depthwise_backward, (tokens, tokens, weight.detach(), mask.index, mask.slots)),
        (ops.cpu_gelu_norm, (x,)),
        (ops.cpu_gelu_grn, (x, norm, bias.detach(), bias.detach())),
        (ops.cpu_gelu_grn_backward, (x.clone(), x, norm, bias.detach(), bias.detach())),
    ]:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_memory_layout(engine, draw_mask):
    mask = draw_mask(2, 3, 4, 6)
    x = torch.randn(2, 24, 4, 10)[..., ::2].permute(0, 3, 1, 2)  # (B, C, V*p, p), every other channel
    weight = torch.randn(7, 7, 1, 5).permute(3, 2, 1, 0)
    compare(
        lambda x, w: get_engine(engine).depthwise(x, w, None, mask),
        lambda x, w: plain_depthwise(x, w, None, mask),
        [x, weight],
        torch.float32,
    )
    x = torch.randn(12, 3, 9).transpose(0, 1)
    ones = torch.ones(9)
    y = get_engine(engine).gelu_grn_linear(x, ones, ones, torch.randn(9, 4).t(), None)
    assert y.shape == (3, 12, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_differentiating_twice_is_refused(engine, draw_mask):
    x = torch.randn(1, 3, 4, 2, requires_grad=True)
    y = get_engine(engine).gelu_grn_linear(x.flatten(2), *(torch.ones(8),) * 2, torch.eye(8), None)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    if engine == "cpu":
        y = get_engine(engine).depthwise(x, torch.ones(3, 1, 7, 7), None, draw_mask(1, 2, 2, 2))
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            gradient.sum().backward()


def test_the_number_of_threads_changes_nothing(draw_mask):
    engine, mask = get_engine("cpu"), draw_mask(3, 4, 4, 6)
    x, weight = torch.randn(3, 40, 24, 4, requires_grad=True), torch.randn(40, 1, 7, 7, requires_grad=True)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = engine.depthwise(x, weight, None, mask)
            z = engine.gelu_grn_linear(y.flatten(2).transpose(1, 2), *(torch.ones(40),) * 2, torch.eye(40), None)
            results.append([z, *torch.autograd.grad(z.square().sum(), (x, weight))])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("engine", ["cpu", "auto"])
def test_a_whole_model(engine, randomise, draw_mask):
    options = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "decoder_dim": 24}
    models = [randomise(fcmae.create_model(**options, engine=name)).double() for name in ("torch", engine)]
    models[1].load_state_dict(models[0].state_dict())
    images, mask = torch.randn(2, 3, 96, 128, dtype=torch.float64), draw_mask(2, 3, 4, 5)
    for model in models:
        model(images, mask).loss.backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.requires_grad:
            assert (a.grad - b.grad).abs().max() <= 1e-10 * a.grad.abs().max(), name


def test_all_engines_learn_the_same():
    curves = {}
    for engine in [*ENGINES, *(["minkowski"] if importlib.util.find_spec("MinkowskiEngine") else [])]:
        torch.manual_seed(0)
        model = fcmae.create_model(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), decoder_dim=24, engine=engine).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        images = torch.randn(4, 3, 64, 64, dtype=torch.float64).cumsum(2).cumsum(3) / 16
        for _ in range(50):  # with a new mask each time
            loss = model(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves[engine] = torch.tensor(losses, dtype=torch.float64)
    assert curves["torch"][-5:].mean() < 0.95 * curves["torch"][0]  # it does learn
    for curve in curves.values():
        torch.testing.assert_close(curve, curves["torch"], rtol=1e-8, atol=0)


def test_an_engine_is_copied_by_its_name():
    for name in ENGINES:
        engine = get_engine(name)
        assert pickle.loads(pickle.dumps(engine)).depthwise is engine.depthwise
    model = fcmae.create_model(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_dim=8)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.encoder.engine == copied.decoder.engine == model.encoder.engine
        copied(torch.randn(1, 3, 64, 64))


def test_auto_takes_the_fastest(monkeypatch):
    monkeypatch.setattr(auto, "_CHOSEN", {})
    assert auto.choose("cpu") == "cpu"
    assert auto.choose("meta") == "torch"


# ---- what the machine may lack ----


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An empty cache of compiled kernels, and engines not chosen yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "_CHOSEN", {})
    caches = [native.load_library, native._target]
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def kernels(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("fcmae/*"))


def load() -> object:
    return native.load_library(SOURCE, "ELEMENT_FLOAT")


def test_kernels_are_compiled_once_and_kept(machine, tmp_path):
    load()
    (name,) = kernels(tmp_path)
    assert name.startswith("cpu-element_float-")
    native.load_library.cache_clear()
    machine.setattr(native, "_run", lambda command: pytest.fail(f"ran {command}") if "-o" in command else "macros")
    native._target.cache_clear()
    with pytest.raises(BaseException, match="ran"):  # other macros: another processor, so another library
        load()


def test_a_kept_library_is_used_again(machine, tmp_path):
    load()
    before = (tmp_path / "fcmae" / kernels(tmp_path)[0]).stat().st_mtime_ns
    native.load_library.cache_clear()
    load()
    assert (tmp_path / "fcmae" / kernels(tmp_path)[0]).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/nowhere/cc", r"there is no C compiler \(/nowhere/cc\) to build it with: install gcc or clang, .*CC"),
        ("false", "`false .*` failed: no word"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"error: disk on fire\")'", "failed: error: disk on fire"),
    ],
)
def test_without_a_compiler(machine, compiler, message):
    machine.setenv("CC", compiler)
    with pytest.raises(UserError, match=message) as raised:
        load()
    assert "\n" not in str(raised.value)


def test_auto_says_once_that_it_takes_torch(machine, caplog):
    machine.setenv("CC", "/nowhere/cc")
    cpu.engine.cache_clear()
    try:
        assert auto.choose("cpu") == auto.choose("cpu") == "torch"
    finally:
        machine.setattr(cpu, "_library", lambda dtype: None)
        machine.setattr(cpu, "build_engine", lambda *_, **__: KNOWN)  # its operators can be registered once
        cpu.engine()
    (message,) = caplog.messages
    assert message == (
        "engine 'torch' is used on cpu instead of 'cpu': engine='cpu' does not work here: there is no C compiler "
        "(/nowhere/cc) to build it with: install gcc or clang, or name one in CC; or use engine=torch"
    )


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_auto_chooses_whatever_the_caller_is_about(machine, mode):
    with mode():
        assert auto.choose("cpu") == "cpu"


def test_auto_leaves_an_engine_that_is_wrong(machine, caplog):
    machine.setattr(auto, "errors", lambda engine, device: {"output": 0.5})
    assert auto.choose("cpu") == "torch"
    assert "its results are off by 5.0e-01" in caplog.text


def test_a_home_that_cannot_be_written_does_not_matter(machine, tmp_path):
    (tmp_path / "file").write_text("")
    machine.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.setattr(native.tempfile, "tempdir", str(tmp_path))
    assert load()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    machine.setattr(native.tempfile, "tempdir", str(tmp_path / "file"))
    native.load_library.cache_clear()
    with pytest.raises(UserError, match=r"a compiled cpu\.c can be neither kept nor loaded .*set XDG_CACHE_HOME"):
        load()


def test_a_cache_that_others_can_write_is_not_used(machine, tmp_path):
    (tmp_path / "fcmae").mkdir()
    (tmp_path / "fcmae").chmod(0o777)
    machine.setattr(native.tempfile, "tempdir", str(tmp_path))
    assert load()
    assert not kernels(tmp_path)


def test_several_may_compile_at_the_same_time(machine, tmp_path):
    with ThreadPoolExecutor(3) as pool:  # as processes would: the cache of functools does not wait
        assert all(pool.map(lambda _: load(), range(3)))
    (name,) = kernels(tmp_path)
    assert name.endswith(".so")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize(("without", "lanes"), [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_on_lesser_processors(machine, without, lanes, tmp_path):
    machine.setenv("CC", f"cc {without}")
    for dtype in (torch.float32, torch.bfloat16):
        assert max(errors(get_engine("cpu"), "cpu", dtype).values()) < BOUND[dtype]
    assert len(kernels(tmp_path)) == 2
    assert load().block_of(8) <= lanes  # one vector


def test_the_check_tells_right_from_wrong():
    engine = get_engine("cpu")
    assert max(errors(engine, "cpu").values()) < 1e-5
    wrong = replace(engine, depthwise=lambda x, weight, **rest: engine.depthwise(x, weight.flip(2), **rest))
    found = errors(wrong, "cpu")
    assert found["depthwise: output"] > 0.1 > found["gelu_grn_linear: output"]


def test_unknown_engines_and_devices():
    with pytest.raises(UserError, match="engine='cuda12' is unknown: use 'auto' or 'torch' or "):
        get_engine("cuda12")
    assert set(ENGINES) < set(NAMES)
    with pytest.raises(UserError, match="engine='cpu' works on cpu alone, the images are on meta: use engine='auto'"):
        get_engine("cpu").check_device(torch.device("meta"))


def test_the_kernels_refuse_what_would_lead_them_astray(draw_mask):
    engine, mask, weight = get_engine("cpu"), draw_mask(2, 3, 3, 4), torch.ones(5, 1, 7, 7)
    x = torch.randn(2, 5, 4 * 2, 2)
    engine.depthwise(x, weight, None, mask)
    for wrong, of_batch in ((x, 1), (x[:, :, :6], 2), (torch.randn(2, 5, 16, 2), 2)):
        with pytest.raises(UserError, match=r"is not packed by this mask of \d x 4 patches on cpu"):
            engine.depthwise(wrong, weight, None, fcmae.Mask(mask.visible[:of_batch]))
    with pytest.raises(UserError, match="on cpu is not packed by this mask of 2 x 4 patches on meta"):
        engine.depthwise(x, weight, None, mask.to("meta"))
    for shape in ((4, 1, 7, 7), (5, 1, 4, 4), (5, 1, 7, 5)):
        with pytest.raises(UserError, match=r"weight \(.*\) must be \(5, 1, k, k\) with an odd k"):
            engine.depthwise(x, torch.ones(shape), None, mask)
    with pytest.raises(UserError, match=r"bias \(4,\) must be \(5,\)"):
        engine.depthwise(x, weight, torch.ones(4), mask)
    for offset in (-1, 9):
        with pytest.raises(UserError, match=r"the mask's index goes from .* its grid has 9"):
            engine.depthwise(x, weight, None, fcmae.Mask(mask.visible, mask.index + offset))
    ones = torch.ones(5)
    for vectors in ((ones[:1], ones), (ones, ones[:4])):
        with pytest.raises(UserError, match=r"GRN's weight \(.*\) and bias \(.*\) must be \(5,\)"):
            engine.gelu_grn_linear(torch.randn(2, 3, 5), *vectors, torch.eye(5), None)
    apart = fcmae.Mask(mask.visible, mask.index.repeat_interleave(2, 1)[:, ::2])
    assert not apart.index.is_contiguous()
    assert torch.equal(engine.depthwise(x, weight, None, apart), engine.depthwise(x, weight, None, mask))


def test_engines_may_be_asked_for_at_the_same_time():
    program = "from concurrent.futures import ThreadPoolExecutor\nfrom fcmae.engines import get_engine\n"
    program += "engines = list(ThreadPoolExecutor(6).map(get_engine, ['cpu'] * 6))\n"
    program += "assert all(engine is engines[0] for engine in engines)\n"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_to_do(draw_mask):
    engine, mask = get_engine("cpu"), draw_mask(2, 2, 2, 2)
    nothing = fcmae.Mask(mask.visible[:0], mask.index[:0])
    assert engine.depthwise(torch.ones(0, 5, 4, 2), torch.ones(5, 1, 7, 7), None, nothing).shape == (0, 5, 4, 2)
    ones = torch.ones(5)
    assert engine.gelu_grn_linear(torch.ones(0, 3, 5), ones, ones, torch.eye(5), None).shape == (0, 3, 5)
    model = fcmae.create_model(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_dim=8)
    with pytest.raises(UserError, match=r"images have shape \(0, 3, 64, 64\), the model takes \(B, 3, H, W\)"):
        model(torch.ones(0, 3, 64, 64))
    with pytest.raises(UserError, match=r"a mask's index is int64 \(B, V\)"):
        fcmae.Mask(mask.visible, mask.index.int())
