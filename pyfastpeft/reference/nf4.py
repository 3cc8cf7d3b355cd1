"""4-bit weights in plain torch: the specification of the kernels (csrc/nf4) and the oracle of their tests.

NF4 is QLoRA's NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E); the bytes are
bitsandbytes' (csrc/nf4/README.md). All arithmetic is fp32, rounded to nearest, no FMA.
"""

from __future__ import annotations

import functools
import math

import torch

NESTED_BLOCKSIZE = 256
ABSMAX_FLOOR = 1e-38
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")

# fp32 bits of the 16 levels, code 0 to 15
_TABLE_BITS = {
    "nf4": (
        0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
        0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
    ),
    "fp4": (
        0x00000000, 0x3BAAAAAB, 0x3F2AAAAB, 0x3F800000, 0x3EAAAAAB, 0x3F000000, 0x3E2AAAAB, 0x3E800000,
        0x00000000, 0xBBAAAAAB, 0xBF2AAAAB, 0xBF800000, 0xBEAAAAAB, 0xBF000000, 0xBE2AAAAB, 0xBE800000,
    ),
}  # fmt: skip
_ZERO_CODE = {"nf4": 7, "fp4": 0}
_FP4_ASCENDING = (0, 1, 6, 7, 4, 5, 2, 3)  # the code of each magnitude, smallest first


@functools.cache
def _table(quant_type: str) -> torch.Tensor:
    bits = [b - (1 << 32) if b >> 31 else b for b in _TABLE_BITS[quant_type]]
    return torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32)


def quant_map(quant_type: str) -> torch.Tensor:
    """The 16 levels of "nf4" or "fp4", fp32, indexed by code: a new tensor on the CPU."""
    return _table(quant_type).clone()


@functools.cache
def _dynamic_map(signed: bool) -> torch.Tensor:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32, device="cpu")
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The 256 ascending levels of the dynamic 8-bit type (Dettmers, arXiv:1511.04561): a new fp32 tensor on the CPU.

    For i = 0…6, 2^i equal bins of [0.1, 1] (2^(i+1) when unsigned): their centres times 10^(i−6), with both signs when
    signed; and 0 and 1.
    """
    return _dynamic_map(signed).clone()


def _blocks(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    """[n] -> [ceil(n / blocksize), blocksize], padded with zeros."""
    padding = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, blocksize)


def quantize_4bit(
    weight: torch.Tensor, blocksize: int = 64, quant_type: str = "nf4"
) -> tuple[torch.Tensor, torch.Tensor]:
    """packed uint8 [(n+1)//2, 1], absmax fp32 [ceil(n / blocksize)] of a finite weight.

    code(i) = number of thresholds strictly below w[i] · (1 / max(absmax, 1e-38)), a threshold being the fp32 midpoint
    of two neighbouring levels; FP4 does so with |w| and adds 8 for negatives that do not round to zero.
    """
    flat = weight.detach().reshape(-1).float()
    blocks = _blocks(flat, blocksize)
    absmax = blocks.abs().amax(1) if flat.numel() else flat.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=ABSMAX_FLOOR))[:, None]).reshape(-1)[: flat.numel()]
    table = _table(quant_type).to(weight.device)
    if quant_type == "nf4":
        code = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)
    else:
        ascending = torch.tensor(_FP4_ASCENDING, device=weight.device)
        levels = table[ascending]
        rank = torch.bucketize(scaled.abs(), (levels[:-1] + levels[1:]) / 2)
        code = ascending[rank] + 8 * ((scaled < 0) & (rank > 0))
    if code.numel() % 2:
        code = torch.nn.functional.pad(code, (0, 1), value=_ZERO_CODE[quant_type])
    code = code.to(torch.uint8)
    return (code[0::2] << 4 | code[1::2])[:, None], absmax


def quantize_absmax(
    absmax: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], nested_map fp32 [256], offset fp32 [] of absmax.

    offset = mean(absmax); d = absmax − offset; per 256: nested_absmax = max|d|; code = number of midpoints of
    neighbouring map entries strictly below d · (1 / max(nested_absmax, 1e-38)), which is the nearest entry, the lower one of two.
    """
    nested_map = _dynamic_map(True).to(absmax.device, copy=True)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested_absmax = centred.abs().amax(1) if absmax.numel() else absmax.new_empty(0)
    scaled = (centred * (1 / nested_absmax.clamp(min=ABSMAX_FLOOR))[:, None]).reshape(-1)[: absmax.numel()]
    codes = torch.bucketize(scaled, (nested_map[:-1] + nested_map[1:]) / 2)
    return codes.to(torch.uint8), nested_absmax, nested_map, offset


def decode_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, nested_map: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """absmax[b] = nested_map[codes[b]] · nested_absmax[b // 256] + offset, fp32 [blocks]."""
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return nested_map[codes.reshape(-1).long()] * scale + offset


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_map: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """table[code(i)] · absmax[i // blocksize] in fp32, then one cast to dtype; shape as given."""
    if nested_map is not None:
        absmax = decode_absmax(absmax, nested_absmax, nested_map, offset)
    n = math.prod(shape)
    byte = packed.reshape(-1).view(torch.uint8)
    code = torch.stack((byte >> 4, byte & 15), 1).reshape(-1)[:n]
    level = _table(quant_type).to(packed.device)[code.long()]
    return (_blocks(level, blocksize) * absmax[:, None]).reshape(-1)[:n].to(dtype).reshape(shape)
