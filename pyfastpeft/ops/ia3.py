"""(IA)³ scaling as a torch op. Maths: pyfastpeft/reference/ia3.py; kernels: csrc/ia3."""

from __future__ import annotations

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops._cuda import target
from pyfastpeft.ops._library import LIBRARY, dtype_code, register_op


def _check(x: torch.Tensor, scale: torch.Tensor, op: str) -> None:
    dtype_code(x.dtype, op, "x")
    if scale.dtype not in (torch.float32, x.dtype):
        raise TypeError(
            f"{op}: scale has dtype {scale.dtype}, expected float32 or x's {x.dtype}; convert it with scale.float()"
        )
    if x.dim() == 0 or scale.dim() != 1 or scale.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and scale {tuple(scale.shape)}, expected x [..., D] and scale [D]; "
            "PEFT's (out, 1) and (1, in) vectors are flattened with scale.reshape(-1)"
        )
    if scale.device != x.device:
        raise ValueError(
            f"{op}: scale is on {scale.device}, expected x's device {x.device}; move it with .to(x.device)"
        )


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x as a matrix whose rows are contiguous, and the distance between rows; copies only what strides cannot say."""
    matrix = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    rows, columns = matrix.shape
    if (columns > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < columns):
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0) if rows > 1 else columns


def _scale_cpu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale, "ia3_scale")
    out = torch.empty(x.shape, dtype=x.dtype)
    matrix, stride = _rows(x)
    scale = scale.float().contiguous()
    _C.ia3_scale_cpu(
        matrix.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        *matrix.shape,
        stride,
        dtype_code(x.dtype, "ia3_scale", "x"),
    )
    return out


def _scale_cuda(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale, "ia3_scale")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    matrix, stride = _rows(x)
    scale = scale.contiguous()
    module, device, stream = target(x, "ia3_scale")
    module.ia3_scale_cuda(
        matrix.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32, out.data_ptr(), *matrix.shape, stride,
        dtype_code(x.dtype, "ia3_scale", "x"), device, stream,
    )  # fmt: skip
    return out


def _scale_fake(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    _check(x, scale, "ia3_scale")
    return x.new_empty(x.shape)


def _check_backward(grad_output: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    _check(x, scale, "ia3_scale_backward")
    if grad_output.shape != x.shape or grad_output.dtype != x.dtype or grad_output.device != x.device:
        raise ValueError(
            f"ia3_scale_backward: grad_output is {grad_output.dtype} {tuple(grad_output.shape)} on {grad_output.device}, "
            f"expected x's {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def _backward_cpu(
    grad_output: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, output_mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad_output, x, scale)
    grad_matrix, grad_stride = _rows(grad_output)
    x_matrix, x_stride = _rows(x) if output_mask[1] else (grad_matrix, grad_stride)
    grad_x = torch.empty(x.shape if output_mask[0] else (0,), dtype=x.dtype)
    grad_scale = torch.empty(scale.shape if output_mask[1] else (0,), dtype=torch.float32)
    scale32 = scale.float().contiguous()
    _C.ia3_scale_backward_cpu(
        grad_matrix.data_ptr(), x_matrix.data_ptr(), scale32.data_ptr(), grad_x.data_ptr(), grad_scale.data_ptr(),
        *grad_matrix.shape, grad_stride, x_stride, dtype_code(x.dtype, "ia3_scale_backward", "x"),
    )  # fmt: skip
    return grad_x, grad_scale.to(scale.dtype)


def _backward_cuda(
    grad_output: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, output_mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad_output, x, scale)
    code = dtype_code(x.dtype, "ia3_scale_backward", "x")
    grad_matrix, grad_stride = _rows(grad_output)
    x_matrix, x_stride = _rows(x) if output_mask[1] else (grad_matrix, grad_stride)
    grad_x = torch.empty(x.shape if output_mask[0] else (0,), dtype=x.dtype, device=x.device)
    grad_scale = torch.empty(scale.shape if output_mask[1] else (0,), dtype=scale.dtype, device=x.device)
    scale = scale.contiguous()
    module, device, stream = target(x, "ia3_scale_backward")
    count = module.ia3_scale_backward_workspace(*grad_matrix.shape, code) if output_mask[1] else 0
    workspace = torch.empty(count, dtype=torch.float32, device=x.device)
    module.ia3_scale_backward_cuda(
        grad_matrix.data_ptr(), x_matrix.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32, grad_x.data_ptr(),
        grad_scale.data_ptr(), workspace.data_ptr(), count, *grad_matrix.shape, grad_stride, x_stride, code, device, stream,
    )  # fmt: skip
    return grad_x, grad_scale


def _backward_fake(
    grad_output: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, output_mask: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_backward(grad_output, x, scale)
    return x.new_empty(x.shape if output_mask[0] else (0,)), scale.new_empty(scale.shape if output_mask[1] else (0,))


def _setup_context(ctx, inputs, output) -> None:
    x, scale = inputs
    # each gradient needs the other input: x is kept alive only when the scale is trained
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)


def _backward(ctx, grad_output):
    x, scale = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    grad_x, grad_scale = _backward_op(grad_output, grad_output if x is None else x, scale, mask)
    return grad_x if mask[0] else None, grad_scale if mask[1] else None


def _setup_double_context(ctx, inputs, output) -> None:
    grad_output, x, scale, ctx.mask = inputs
    ctx.save_for_backward(grad_output, x, scale)


def _double_backward(ctx, gg_x, gg_scale):
    """With gx = dy·s and gs = Σ dy·x, and u, w the gradients arriving at them: to dy u·s + w·x, to x w·dy, to s Σ u·dy."""
    grad_output, x, scale = ctx.saved_tensors
    to_grad = to_x = to_scale = None
    if ctx.mask[0]:
        to_grad = ia3_scale(gg_x, scale)
        to_scale = (gg_x.float() * grad_output.float()).reshape(-1, x.shape[-1]).sum(0).to(scale.dtype)
    if ctx.mask[1]:
        through_scale = ia3_scale(x, gg_scale)
        to_grad = through_scale if to_grad is None else to_grad + through_scale
        to_x = ia3_scale(grad_output, gg_scale)
    return to_grad, to_x, to_scale, None


# No autocast rule, as for torch's `*`: the op computes in whatever dtype x arrives in.
_op = register_op(
    "ia3_scale(Tensor x, Tensor scale) -> Tensor",
    cpu=_scale_cpu,
    cuda=_scale_cuda,
    fake=_scale_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = register_op(
    "ia3_scale_backward(Tensor grad_output, Tensor x, Tensor scale, bool[2] output_mask) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    setup_context=_setup_double_context,
    backward=_double_backward,
)


def _vmap(info, in_dims, x, scale):
    x_dim, scale_dim = in_dims
    if scale_dim is None:  # one scale: the batch is one more token dimension
        return _op(x.movedim(x_dim, 0), scale), 0
    scales = scale.movedim(scale_dim, 0)
    xs = [x] * info.batch_size if x_dim is None else x.movedim(x_dim, 0)
    return torch.stack([_op(a, s) for a, s in zip(xs, scales, strict=True)]), 0


def _vmap_backward(info, in_dims, grad_output, x, scale, output_mask):
    slices = [
        [t] * info.batch_size if dim is None else t.movedim(dim, 0)
        for t, dim in zip((grad_output, x, scale), in_dims[:3], strict=True)
    ]
    outputs = [_backward_op(*each, output_mask) for each in zip(*slices, strict=True)]
    return tuple(torch.stack(o) for o in zip(*outputs, strict=True)), (0, 0)


torch.library.register_vmap("pyfastpeft::ia3_scale", _vmap, lib=LIBRARY)
torch.library.register_vmap("pyfastpeft::ia3_scale_backward", _vmap_backward, lib=LIBRARY)


def ia3_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y[..., d] = x[..., d] · scale[d]: (IA)³'s rescaling of activations, differentiable in both.

    x      [..., D], float32, bfloat16 or float16, any strides (rows that are contiguous are read in place)
    scale  [D], float32 (what adapters are stored in) or x's dtype

    Returns [..., D] in x's dtype, contiguous. The product is taken in fp32 and rounded once. Unlike torch's
    `x * scale`, an fp32 scale does not turn bf16 activations into fp32; under autocast nothing else changes, since
    autocast leaves multiplication alone.

    Backward, one pass: grad_x = grad_y · scale; grad_scale[d] = Σ grad_y · x over all but the last dimension,
    accumulated in fp32 or better, the same bits for any number of threads.

    Raises TypeError for other dtypes, ValueError for shapes or devices that do not fit.
    Source: Liu et al., arXiv:2205.05638, section 3.3.
    """
    return _op(x, scale)
