"""What linear_lora and linear_4bit share on every device: the checks of their arguments and the dropout seed.

The low-rank path itself is _linear_cpu.py and _linear_cuda.py.
"""

from __future__ import annotations

import math

import torch

from pyfastpeft.ops._library import dtype_code, register_vmap, vmap_by_loop

LORA_SCHEMA = "float scaling, float dropout_p, Tensor? seed"


def check_x(op: str, x, N: int, K: int) -> None:
    dtype_code(x.dtype, op, "x")
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected [..., {K}] for a weight [{N}, {K}]")


def check_grad(op: str, grad_output, x, N: int, K: int, reads_x: bool) -> None:
    """The backward ops' own: grad_output [..., N], and x [..., K] of as many rows where it is read."""
    dtype_code(grad_output.dtype, op, "grad_output")
    if grad_output.dim() < 1 or grad_output.shape[-1] != N:
        raise ValueError(
            f"{op}: grad_output has shape {tuple(grad_output.shape)}, expected [..., {N}] for a weight [{N}, {K}]"
        )
    expected = (*grad_output.shape[:-1], K)
    if reads_x and (x.dtype != grad_output.dtype or tuple(x.shape) != expected or x.device != grad_output.device):
        raise ValueError(
            f"{op}: x is {x.dtype} {tuple(x.shape)} on {x.device}, expected {grad_output.dtype} {expected} on "
            f"{grad_output.device} for grad_output {tuple(grad_output.shape)} and a weight [{N}, {K}]"
        )


def check_s(op: str, grad_output, s, lora_a) -> None:
    """The forward's S, where the backward reads it."""
    expected = (*grad_output.shape[:-1], lora_a.shape[0])
    if s.dtype != torch.float32 or tuple(s.shape) != expected or s.device != grad_output.device:
        raise ValueError(
            f"{op}: s is {s.dtype} {tuple(s.shape)} on {s.device}, expected torch.float32 {expected} on {grad_output.device}, as the forward gave it, for the "
            "gradient of lora_b"
        )


def empty_mask(x: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """What stands for the mask of a dropout of x [..., K]: its words on the CPU, no value where none is kept."""
    if dropout_p == 0 or x.device.type != "cpu":
        return x.new_empty(0, dtype=torch.int32)
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + 31) // 32), dtype=torch.int32)


def check_mask(op: str, grad_output, mask, K: int, dropout_p: float) -> None:
    """The forward's mask, where the CPU's backward is given one to read."""
    if dropout_p == 0 or mask is None:
        return
    expected = (*grad_output.shape[:-1], (K + 31) // 32)
    if mask.dtype != torch.int32 or tuple(mask.shape) != expected or mask.device != grad_output.device:
        raise ValueError(
            f"{op}: mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, expected torch.int32 {expected} on "
            f"{grad_output.device}, as the forward gave it, for a dropout_p of {dropout_p}"
        )


def check_operands(op: str, device, N: int, K: int, bias, lora_a, lora_b, dropout_p: float, seed) -> None:
    """Everything but x and the weight, for real and fake tensors alike."""
    if bias is not None:
        dtype_code(bias.dtype, op, "bias")
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({N},) for a weight [{N}, {K}]")
    if lora_a is not None and lora_b is not None:
        dtype_code(lora_a.dtype, op, "lora_a")
        dtype_code(lora_b.dtype, op, "lora_b")
        if lora_a.dim() != 2 or lora_a.shape[1] != K:
            raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}, expected [R, {K}] for a weight [{N}, {K}]")
        if lora_b.dim() != 2 or lora_b.shape[0] != N or lora_b.shape[1] != lora_a.shape[0]:
            raise ValueError(
                f"{op}: lora_b has shape {tuple(lora_b.shape)}, expected [{N}, {lora_a.shape[0]}] for a weight "
                f"[{N}, {K}] and lora_a {tuple(lora_a.shape)}"
            )
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability from 0 to 1")
        if dropout_p > 0 and seed is None:
            raise ValueError(f"{op}: dropout_p is {dropout_p} but seed is None; give an int64 tensor with one value")
        if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
            raise ValueError(f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)}, expected int64 of shape (1,)")
    elif lora_a is not lora_b:
        raise ValueError(
            f"{op}: {'lora_a' if lora_a is None else 'lora_b'} is None, expected both lora_a and lora_b or neither"
        )
    elif dropout_p != 0:
        raise ValueError(
            f"{op}: dropout_p is {dropout_p} without lora_a and lora_b; dropout acts on the LoRA path alone: give 0"
        )
    for name, tensor in (("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b), ("seed", seed)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {device}; move one with .to(device)")


def draw_seed(x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor | None:
    """The seed of a call's dropout: the caller's, or a fresh one from torch's generator on x's device.

    A tensor, so that compiled and captured code draws a new one each step, and so that a checkpointed recomputation,
    which restores the generator, draws the same one.
    """
    if seed is not None or dropout_p == 0:
        return seed
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether F.linear under autocast would cast it: floating point, but not double."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def shaped(x: torch.Tensor, y: torch.Tensor, s=None, mask=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [M, N], S [M, R] and the mask's words with the leading dimensions of x; no value where there is none."""
    lead = x.shape[:-1]
    s = x.new_empty(0, dtype=torch.float32) if s is None else s.view(*lead, s.shape[-1])
    mask = x.new_empty(0, dtype=torch.int32) if mask is None else mask.view(*lead, mask.shape[-1])
    return y.view(*lead, y.shape[-1]), s, mask


def register_token_vmap(op) -> None:
    """The batching rule of op(x, ..., dropout_p, seed), with y or (y, s, mask) as its result: where x alone is batched
    and nothing is dropped, the batch is one more token dimension; else one call per element."""

    def rule(info, in_dims, x, *rest):
        if rest[-2] != 0 or any(isinstance(dim, int) for dim in in_dims[1:]):
            return vmap_by_loop(op, info, in_dims, x, *rest)
        result = op(x.movedim(in_dims[0], 0), *rest)
        if not isinstance(result, tuple):
            return result, 0
        return result, tuple(None if part.dim() == 1 and part.numel() == 0 else 0 for part in result)

    register_vmap(op, rule)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., D] → contiguous [M, D]; a copy only where strides demand one."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()
