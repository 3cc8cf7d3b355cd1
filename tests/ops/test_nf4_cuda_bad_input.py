"""What the CUDA 4-bit ops say to input they cannot take: an error that names it, never a fault."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfastpeft as pf
from pyfastpeft.ops import _cuda, nf4_cuda

op = torch.ops.pyfastpeft


def parts(device="cpu"):
    """A nested quantised weight's arguments, on one device."""
    return list(pf.ops.quantize_4bit(torch.randn(8, 64, device=device), 32, double_quant=True).flat())


# ---- devices ------------------------------------------------------------------------------------------------------

NAMES = ["packed", "absmax", "nested_absmax", "nested_map", "offset"]


@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_a_cpu_tensor_among_cuda_ones_is_named(index):
    with FakeTensorMode():
        flat = parts("cuda")
        flat[index] = torch.empty_like(flat[index], device="cpu")
        wrong = (
            "absmax is on cuda:0, packed is on cpu" if index == 0 else f"{NAMES[index]} is on cpu, packed is on cuda:0"
        )
        with pytest.raises(ValueError, match=f"dequantize_4bit: {wrong}"):
            op.dequantize_4bit(*flat)


def test_a_tensor_of_another_gpu_is_named():
    with FakeTensorMode():
        flat = parts("cuda:0")
        flat[2] = torch.empty_like(flat[2], device="cuda:1")
        with pytest.raises(ValueError, match="nested_absmax is on cuda:1, packed is on cuda:0"):
            op.dequantize_4bit(*flat)
        flat = parts("cuda:0")
        with pytest.raises(ValueError, match=r"out is torch.float32 \(8, 64\) on cpu, .* on cuda:0"):
            op.dequantize_4bit.out(*flat, out=torch.empty(8, 64))


def test_the_implementations_check_devices_themselves():
    """What reaches them is not what a fake tensor went through: the dispatcher picks them if any tensor is on a GPU."""
    flat = parts()
    flat[1] = flat[1].to("meta")
    with pytest.raises(ValueError, match="absmax is on meta, packed is on cpu"):
        nf4_cuda.dequantize(*flat)
    with pytest.raises(ValueError, match="out is .* on meta, expected .* on cpu"):
        nf4_cuda.dequantize_out(*parts(), out=torch.empty(8, 64, device="meta"))


def test_a_cpu_tensor_never_reaches_a_launcher():
    for call in (
        lambda: nf4_cuda.quantize(True)(torch.randn(64), 64, "nf4"),
        lambda: nf4_cuda.quantize_absmax(True)(torch.rand(64)),
        lambda: nf4_cuda.dequantize(*parts()),
        lambda: _cuda.target(torch.randn(1), "some_op"),
    ):
        with pytest.raises((ValueError, RuntimeError), match="a tensor is on cpu and another on a GPU|no CUDA kernels"):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_mixed_devices_on_a_gpu(index):
    flat = parts("cuda")
    flat[index] = flat[index].cpu()
    with pytest.raises(ValueError, match="dequantize_4bit: .* is on"):
        op.dequantize_4bit(*flat)
    with pytest.raises(ValueError, match="out is .* on cpu"):
        op.dequantize_4bit.out(*parts("cuda"), out=torch.empty(8, 64))


# ---- dtypes, block sizes, shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.ones(64, dtype=torch.float64),), TypeError, "weight has dtype torch.float64, expected float32"),
        ((torch.ones(64, dtype=torch.int8),), TypeError, "weight has dtype torch.int8"),
        ((torch.ones(64), 48), ValueError, "blocksize is 48, expected a power of two from 32 to 4096"),
        ((torch.ones(64), 8192), ValueError, "blocksize is 8192"),
        ((torch.ones(64), 0), ValueError, "blocksize is 0"),
        ((torch.ones(64), -64), ValueError, "blocksize is -64"),
        ((torch.ones(64), 64, "int4"), ValueError, "quant_type is 'int4', expected 'nf4' or 'fp4'"),
    ],
)
def test_quantize(device, args, error, match):
    with pytest.raises(error, match=match):
        pf.ops.quantize_4bit(args[0].to(device), *args[1:])


@pytest.mark.parametrize(
    ("absmax", "match"),
    [(torch.ones(4, dtype=torch.float64), "absmax is torch.float64"), (torch.ones(2, 2), r"of shape \(2, 2\)")],
)
def test_quantize_absmax(device, absmax, match):
    with pytest.raises(TypeError, match=match):
        op.quantize_absmax(absmax.to(device))


@pytest.mark.parametrize(
    ("index", "value", "error", "match"),
    [
        (0, torch.zeros(255, 1, dtype=torch.uint8), ValueError, "packed has 255 values, expected 256"),
        (0, torch.zeros(256, 1, dtype=torch.int8), TypeError, "packed has dtype torch.int8, expected torch.uint8"),
        (1, torch.zeros(15, dtype=torch.uint8), ValueError, "absmax has 15 values, expected 16"),
        (1, torch.zeros(16), TypeError, "absmax has dtype torch.float32, expected torch.uint8"),
        (2, torch.zeros(2), ValueError, "nested_absmax has 2 values, expected 1"),
        (2, None, ValueError, "given together"),
        (3, torch.zeros(255), ValueError, "nested_map has 255 values, expected 256"),
        (4, torch.zeros(2), ValueError, "offset has 2 values, expected 1"),
        (5, 16, ValueError, "blocksize is 16"),
        (6, "af4", ValueError, "quant_type is 'af4'"),
        (7, [8, 65], ValueError, "packed has 256 values, expected 260"),
        (8, torch.float64, TypeError, "the output has dtype torch.float64"),
    ],
)
def test_dequantize(device, index, value, error, match):
    flat = parts(device)
    flat[index] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=match):
        op.dequantize_4bit(*flat)


def test_dequantize_out(device):
    flat = parts(device)
    for out, error, match in [
        (torch.empty(8, 63, device=device), ValueError, r"out is torch.float32 \(8, 63\)"),
        (torch.empty(8, 64, dtype=torch.bfloat16, device=device), ValueError, "expected torch.float32"),
        (torch.empty(8, 64, device="meta"), ValueError, "on meta, expected"),
        (torch.empty(8, 64, device=device, requires_grad=True), RuntimeError, "out requires grad"),
    ]:
        with pytest.raises(error, match=match):
            op.dequantize_4bit.out(*flat, out=out)


# ---- what the runtime answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantize_4bit", "quantize_absmax", "dequantize_4bit"])
def test_a_launch_that_fails_is_an_error_of_the_op(name):
    backend = pytest.importorskip("emu.backend")
    build = pytest.importorskip("emu.build")
    try:
        build.load()
    except build.Unavailable as missing:
        pytest.skip(f"the host executor cannot be built: {missing}")
    with backend.emulated() as module:
        flat = parts()
        calls = {
            "quantize_4bit": lambda: pf.ops.quantize_4bit(torch.randn(64)),
            "quantize_absmax": lambda: op.quantize_absmax(torch.rand(4)),
            "dequantize_4bit": lambda: op.dequantize_4bit(*flat),
        }
        module.emu_fail_launch(209)  # cudaErrorNoKernelImageForDevice
        with pytest.raises(
            RuntimeError,
            match=rf"{name}: launching nf4_\w+ failed: .* compute capability 9\.0, .* PYFASTPEFT_CUDA_ARCHS=90",
        ):
            calls[name]()
        calls[name]()  # the next one runs
