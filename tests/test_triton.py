"""Engine `triton`: outputs and all gradients against plain formulas in float64, on a GPU or in Triton's interpreter.

The interpreter is chosen when triton is imported, for the whole process; so it gets a process of its own, where this
file runs again. What it accepts need not compile, so the kernels are compiled for GPUs here, which takes none.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fcmae
from fcmae.engines.engine import Engine
from fcmae.engines.torch import depthwise as torch_depthwise
from fcmae.errors import UserError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
# One unit in the last place of the largest element and a little: the interpreter truncates where a GPU rounds.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
HALF = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
interpreter = pytest.mark.skipif(INTERPRETED, reason="is about what the interpreter is not")


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not CUDA:
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.fixture
def gpu() -> None:
    if INTERPRETED or not CUDA:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="module")
def choices() -> Iterator[Any]:
    """All choices of blocks; on a GPU most tests compile one of them, since it takes seconds and changes no bit."""
    if INTERPRETED or not CUDA:
        yield ()
        return
    with pytest.MonkeyPatch.context() as patched:
        every = kernels().CONVOLUTIONS
        patched.setattr(kernels(), "CONVOLUTIONS", every[:1])
        kernels()._tuned_convolve.cache_clear()
        yield every
    kernels()._tuned_convolve.cache_clear()


def kernels() -> Any:
    """The engine's module, imported late: most processes that collect this file need no triton."""
    return importlib.import_module("fcmae.engines.triton")


def plain_gelu_grn_linear(x: Tensor, grn_weight: Tensor, grn_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    norm = h.square().sum(1, keepdim=True).sqrt()
    return F.linear(grn_weight * (h * norm / (norm.mean(2, keepdim=True) + 1e-6)) + grn_bias + h, weight, bias)


def assert_close(a: Tensor, b: Tensor, bound: float, name: object = "") -> None:
    assert a.shape == b.shape, name
    assert (a.double() - b).abs().max() <= bound * b.abs().max(), name


def compare(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor | None], dtype: torch.dtype
) -> None:
    """Output and gradients, each relative to its largest element; inputs are rounded to `dtype` for both."""
    given = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    y, expected = ours(*given), plain(*exact)
    assert y.dtype == dtype
    probe = torch.randn_like(expected).to(dtype)
    results = torch.autograd.grad(y, [x for x in given if x is not None], probe)
    references = torch.autograd.grad(expected, [x for x in exact if x is not None], probe.double())
    for number, (a, b) in enumerate(zip([y, *results], [expected, *references], strict=True)):
        assert a.dtype == dtype
        assert_close(a, b, BOUND[dtype], number)


def compare_depthwise(mask: fcmae.Mask, p: int, channels: int, device: str, dtype: torch.dtype, k: int = 7) -> None:
    mask = mask.to(device)
    batch, seen = mask.index.shape
    inputs = [torch.randn(batch, channels, seen * p, p), torch.randn(channels, 1, k, k), torch.randn(channels)]
    compare(
        lambda x, weight, bias: kernels().engine().depthwise(x, weight, bias, mask),
        lambda x, weight, bias: torch_depthwise(x, weight, bias, mask),
        [x.to(device) for x in inputs],
        dtype,
    )


def compare_mlp(batch: int, positions: int, channels: int, device: str, dtype: torch.dtype) -> None:
    width = max(1, channels // 4)
    inputs = [3 * torch.randn(batch, positions, channels), torch.randn(channels), torch.randn(channels)]
    inputs += [torch.randn(width, channels) / channels**0.5, torch.randn(width)]
    compare(kernels().engine().gelu_grn_linear, plain_gelu_grn_linear, [x.to(device) for x in inputs], dtype)


# batch, patches (h, w), seen, p, channels
SHAPES = [
    (2, (3, 5), 6, 8, 40),
    (1, (1, 4), 1, 16, 3),  # one patch is seen
    (2, (5, 3), 15, 4, 3),  # all are
    (1, (7, 7), 19, 2, 96),
    (3, (7, 7), 19, 1, 40),
    (2, (2, 3), 3, 3, 5),
    (1, (3, 2), 4, 12, 2),
    (1, (2, 2), 3, 1, 352),
]
LARGE = [
    (2, (7, 7), 19, 8, 96),
    (2, (7, 7), 19, 4, 352),
    (1, (3, 5), 7, 16, 40),
    (1, (40, 64), 999, 1, 33),
    (1, (2, 2), 3, 1, 2816),
]
EVERY = [torch.float32, torch.float64, *HALF]


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE)], ids=str)
def test_depthwise(shape, device, draw_mask):
    batch, grid, seen, p, channels = shape
    compare_depthwise(draw_mask(batch, *grid, seen), p, channels, device, torch.float32)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(("p", "k"), [(8, 3), (4, 5), (2, 7), (1, 1)])
def test_depthwise_in_every_type(p, k, dtype, device, draw_mask):
    compare_depthwise(draw_mask(2, 2, 3, 3), p, 12, device, dtype, k)


@given(data=st.data())
@settings(max_examples=3)
def test_depthwise_whatever_the_shape(data, device, draw_mask):
    batch, h, w, p = (
        data.draw(st.integers(1, most), name) for name, most in (("batch", 2), ("h", 4), ("w", 4), ("p", 6))
    )
    mask = draw_mask(batch, h, w, data.draw(st.integers(1, h * w), "seen"))
    compare_depthwise(mask, p, data.draw(st.integers(1, 70), "channels"), device, torch.float32)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 12), (1, 1, 20), (3, 33, 160)], ids=str)
def test_gelu_grn_linear(shape, dtype, device):
    compare_mlp(*shape, device, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3000, 64), (2, 19, 1408)], ids=str)
def test_gelu_grn_linear_of_larger_shapes(shape, device):
    compare_mlp(*shape, device, torch.float32)


def test_programs_with_several_blocks_each(device, draw_mask, monkeypatch):
    monkeypatch.setattr(kernels(), "WEIGHT_GRADIENT", {"block": 8, "block_c": 16})
    monkeypatch.setattr(kernels(), "PROGRAMS", 4)
    monkeypatch.setattr(kernels(), "GELU_PROGRAMS", 3)
    compare_depthwise(draw_mask(2, 3, 4, 7), 2, 33, device, torch.float32, k=5)  # 28 runs: 4 blocks of 8, 3 each
    compare_mlp(2, 100, 70, device, torch.float32)  # 4 blocks of 32: one sum per image
    monkeypatch.setattr(kernels(), "GELU_PROGRAMS", 5)
    compare_mlp(2, 150, 70, device, torch.float32)  # 5 blocks of 32, 4 each


def test_strided_inputs_and_no_bias(device, draw_mask):
    mask = draw_mask(2, 2, 3, 4).to(device)

    def strided(depthwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, weight: Tensor) -> Tensor:
            y = depthwise(x[..., ::2].permute(0, 3, 1, 2), weight.permute(2, 0, 1)[:, None], None, mask)
            return y.sum(0, keepdim=True)  # whose gradient is expanded

        return function

    inputs = [torch.randn(2, 8, 2, 12, device=device), torch.randn(7, 7, 6, device=device)]
    compare(strided(kernels().engine().depthwise), strided(torch_depthwise), [*inputs], torch.float32)

    x, vector = torch.randn(9, 2, 12, device=device), torch.randn(12, 2, device=device)
    compare(
        lambda x, v, w: kernels().engine().gelu_grn_linear(x.transpose(0, 1), v[:, 0], v[:, 1], w.t(), None),
        lambda x, v, w: plain_gelu_grn_linear(x.transpose(0, 1), v[:, 0], v[:, 1], w.t(), None),
        [x, vector, torch.randn(12, 5, device=device)],
        torch.float32,
    )


def test_channels_that_are_zero_everywhere(device):
    x = torch.randn(2, 5, 8, device=device)
    x[:, :, 3] = 0
    vectors = [torch.randn(8, device=device) for _ in range(2)]
    inputs = [x.requires_grad_(), *vectors, torch.eye(8, device=device), None]
    (gradient,) = torch.autograd.grad(kernels().engine().gelu_grn_linear(*inputs).sum(), x)
    assert gradient.isfinite().all()


def test_weights_stay_in_float32_under_autocast(device, draw_mask):
    mask = draw_mask(2, 2, 2, 2).to(device)
    x = torch.randn(2, 8, 8, 4, device=device, requires_grad=True)
    weight = torch.randn(8, 1, 7, 7, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = kernels().engine().depthwise(x, weight, None, mask)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight))] == [torch.float32] * 2
    assert_close(y, torch_depthwise(x.bfloat16().double(), weight.double(), None, mask), BOUND[torch.bfloat16])


def test_differentiating_twice_is_refused(device, draw_mask):
    mask, engine = draw_mask(1, 2, 2, 2).to(device), kernels().engine()
    x = torch.randn(1, 4, 4, 2, device=device, requires_grad=True)
    weight = torch.randn(4, 1, 7, 7, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(engine.depthwise(x, weight, None, mask).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"triton_depthwise_backward.* no autograd formula"):
        gradient.sum().backward()
    vector = torch.ones(4, device=device, requires_grad=True)
    y = engine.gelu_grn_linear(x.flatten(2).mT, vector, vector, torch.eye(4, device=device), None)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_operators_are_what_torch_expects(device, draw_mask):
    kernels().engine()
    mask = draw_mask(2, 2, 3, 3).to(device)
    tokens = torch.randn(2, 3, 2, 2, 8, device=device, requires_grad=True)
    weight, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((8, 1, 3, 3), (8,)))
    x, norm, scale = (
        torch.randn(2, 12, 8, device=device),
        torch.rand(2, 8, device=device),
        torch.randn(8, device=device),
    )
    operators = torch.ops.fcmae
    for operator, inputs in (
        (operators.triton_depthwise, (tokens, weight, bias, mask.index, mask.slots)),
        (operators.triton_depthwise, (tokens.bfloat16(), weight, None, mask.index, mask.slots)),
        (
            operators.triton_depthwise_backward,
            (tokens.detach(), tokens.detach(), weight.detach(), mask.index, mask.slots),
        ),
        (operators.triton_gelu_norm, (x,)),
        (operators.triton_gelu_grn, (x, norm, scale, scale)),
        (operators.triton_gelu_grn_backward, (torch.randn_like(x), x, norm, scale, scale)),
    ):
        torch.library.opcheck(operator, inputs)


def block(
    x: Tensor, weight: Tensor, bias: Tensor, grn: Tensor, linear: Tensor, mask: fcmae.Mask, engine: Engine
) -> Tensor:
    """Both of the engine's functions, one after the other: x (B, C, V*p, p) -> (B, V*p*p, D)."""
    y = engine.depthwise(x, weight, bias, mask)
    tokens: Tensor = engine.gelu_grn_linear(y.flatten(2).mT, grn[0], grn[1], linear, None)
    return tokens


def block_inputs(
    batch: int, channels: int, seen: int, p: int, device: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = [
        (batch, channels, seen * p, p),
        (channels, 1, 7, 7),
        (channels,),
        (2, channels),
        (channels // 2, channels),
    ]
    return [torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def run_block(function: Callable[..., Tensor], inputs: list[Tensor], mask: fcmae.Mask) -> list[Tensor]:
    """Output and gradients."""
    y = function(*inputs, mask, kernels().engine())
    return [y.detach(), *torch.autograd.grad(y.float().square().mean(), inputs)]


def test_compiled_as_one_graph(device, draw_mask):
    mask, inputs = draw_mask(2, 2, 3, 3).to(device), block_inputs(2, 8, 3, 2, device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run_block(compiled, inputs, mask), run_block(block, inputs, mask), strict=True):
        assert_close(a, b.double(), 1e-6)


# In a process of its own, or without a device.


@interpreter
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(which):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", f"{which} and not gpu", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of Triton up to 3.6, at least, does not work with NumPy from 2.4 on")
    assert run.returncode == 0, run.stdout + run.stderr


@interpreter
@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_without_a_device():
    with pytest.raises(UserError, match="engine='triton' needs a CUDA device") as raised:
        kernels().engine()
    assert "\n" not in str(raised.value)


@interpreter
def test_without_triton():
    code = "import sys; sys.modules['triton'] = None; import fcmae.engines.triton"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fcmae.errors.UserError: engine='triton' needs the package triton" in run.stderr.splitlines()[-1]


WHOLE = {
    "runs",
    "magnitude",
    "patches",
    "h",
    "w",
    "length",
    "share",
    "splits",
}  # the kernels' arguments that are numbers
SUMS = {"taps", "bias", "partial", "scale", "shift", "products", "totals"}  # pointers to sums; others are to elements
MLP = {"channels": 160, "block_n": 32, "block_c": 64}


def depthwise_constants(p: int, channels: int, block: int, block_c: int) -> dict[str, int]:
    return {"p": p, "width": min(p, 8), "k": 7, "channels": channels, "block": block, "block_c": block_c}


@interpreter
@pytest.mark.parametrize("elements", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        *(("_convolve", depthwise_constants(p, 96, 16, 32)) for p in (8, 1)),
        ("_convolve", {**depthwise_constants(4, 40, 16, 16), "bias": None}),
        *(("_weight_gradient", depthwise_constants(p, 96, 16, 32)) for p in (8, 1)),
        ("_gelu_sums", MLP),
        ("_gelu_sums", MLP | {"grad": None, "scale": None, "bias": None, "y": None, "totals": None}),
        ("_gelu_map", MLP),
        ("_gelu_map", MLP | {"grad": None}),
    ],
    ids=str,
)
def test_kernels_compile_for_a_gpu(name, constants, elements):
    """For the H100's kind, without one: the interpreter runs much that the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(kernels(), name)
    pointers = {"index": "*i64", "slots": "*i32"} | dict.fromkeys(SUMS, "*fp32") | dict.fromkeys(WHOLE, "i32")
    signature = {a: "constexpr" if a in constants else pointers.get(a, f"*{elements}") for a in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options=kernels().OPTIONS).asm["ptx"]


# On a GPU alone.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("p", "channels"), [(8, 96), (4, 192), (2, 384), (1, 768)])
def test_the_stages_of_tiny(p, channels, dtype, gpu, draw_mask):
    compare_depthwise(draw_mask(8, 7, 7, 19), p, channels, "cuda", dtype)
    compare_mlp(8, 19 * p * p, 4 * channels, "cuda", dtype)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(gpu):
    """The last image of many is computed as it is alone; 4.5 GiB per tensor in bfloat16."""
    batch, seen, p, channels = 280, 64, 8, 2048
    mask = fcmae.Mask(torch.ones(batch, 8, 8, dtype=torch.bool, device="cuda"))
    last = fcmae.Mask(mask.visible[-1:])
    tokens = torch.randn(1, seen, p, p, channels, device="cuda").bfloat16()
    many = torch.zeros(batch, seen, p, p, channels, dtype=torch.bfloat16, device="cuda")
    assert many.numel() > 2**31
    many[-1:] = tokens
    taps, vector = torch.randn(49, channels, device="cuda"), torch.ones(1, channels, device="cuda")
    ours = kernels().Kernels()
    assert torch.equal(
        ours.convolve(many, taps, None, mask.index, mask.slots)[-1:],
        ours.convolve(tokens, taps, None, last.index, last.slots),
    )
    results = zip(
        ours.weight_gradient(many, many, mask.index, mask.slots, 7),
        ours.weight_gradient(tokens, tokens, last.index, last.slots, 7),
        strict=True,
    )
    for a, b in results:
        assert_close(a, b.double(), 1e-5)
    x, xs = tokens.view(1, -1, channels), many.view(batch, -1, channels)
    assert_close(ours.gelu_squares(xs)[-1:], ours.gelu_squares(x).double(), 1e-5)
    scaled = ours.gelu_scale(xs, vector.expand(batch, -1).contiguous(), vector[0])[-1:]
    assert torch.equal(scaled, ours.gelu_scale(x, vector, vector[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype, gpu, draw_mask):
    mask, inputs = draw_mask(8, 7, 7, 19).to("cuda"), block_inputs(8, 96, 19, 8, "cuda", dtype)
    for a, b in zip(run_block(block, inputs, mask), run_block(block, inputs, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_every_choice_of_blocks_gives_the_same_bits(gpu, draw_mask, monkeypatch, choices):
    mask, inputs = draw_mask(8, 7, 7, 19).to("cuda"), block_inputs(8, 96, 19, 8, "cuda")
    results = []
    for choice in choices:
        monkeypatch.setattr(kernels(), "CONVOLUTIONS", (choice,))
        kernels()._tuned_convolve.cache_clear()
        results.append(run_block(block, inputs, mask))
    monkeypatch.undo()
    kernels()._tuned_convolve.cache_clear()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.gpu
def test_compiled_with_inductor(gpu, draw_mask):
    mask, inputs = draw_mask(8, 7, 7, 19).to("cuda"), block_inputs(8, 96, 19, 8, "cuda")
    compiled = torch.compile(block, fullgraph=True)
    for a, b in zip(run_block(compiled, inputs, mask), run_block(block, inputs, mask), strict=True):
        assert_close(a, b.double(), 1e-5)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(gpu, draw_mask):
    mask, inputs = draw_mask(8, 7, 7, 19).to("cuda"), block_inputs(8, 96, 19, 8, "cuda")
    run_block(block, inputs, mask)  # compiles and tunes, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_block(block, inputs, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_replayed_from_a_cuda_graph(gpu, draw_mask):
    masks = [draw_mask(8, 7, 7, 19).to("cuda") for _ in range(2)]
    batches = [block_inputs(8, 96, 19, 8, "cuda") for _ in range(2)]
    expected = [run_block(block, inputs, mask) for inputs, mask in zip(batches, masks, strict=True)]

    mask = fcmae.Mask(masks[0].visible.clone(), masks[0].index.clone())
    inputs = [x.detach().clone().requires_grad_() for x in batches[0]]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run_block(block, inputs, mask)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_block(block, inputs, mask)

    for number in (1, 0):
        with torch.no_grad():
            for held, x in zip(inputs, batches[number], strict=True):
                held.copy_(x)
            for name in ("visible", "index", "slots"):
                getattr(mask, name).copy_(getattr(masks[number], name))
        graph.replay()
        for a, b in zip(results, expected[number], strict=True):
            assert_close(a, b.double(), 1e-6)
