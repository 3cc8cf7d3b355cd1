"""One parameter's AdamW state out of a state dict: torch's, ours, or bitsandbytes', in the precision that is wanted."""

from __future__ import annotations

from typing import Any

import torch

from pyfastpeft.reference.adamw import BLOCK, dequantize_moment, quantize_moment

_BNB_NESTED = "__bnb_optimizer_quant_state__"  # bitsandbytes >= 0.49 hides its 8-bit tensors from FSDP under this key
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's values as they lie: what the blocks of the 8-bit format run over."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _placed(value: torch.Tensor, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy with p's layout and device."""
    return torch.empty_like(p, dtype=dtype).copy_(value)


def _same_order(value: torch.Tensor, p: torch.Tensor) -> bool:
    return value.stride() == p.stride() or (value.is_contiguous() and p.is_contiguous())


def _check(ok: bool, key: Any, what: str, expected: str) -> None:
    if not ok:
        raise ValueError(f"AdamW.load_state_dict: state {key}: {what}, expected {expected}")


def _moment(p: torch.Tensor, state: dict[str, Any], key: Any, number: int) -> dict[str, torch.Tensor]:
    """Moment 1 or 2 as it was saved: {"values"} in fp32, or {"codes", "absmax", "qmap"}."""
    name = _MOMENTS[number - 1] if _MOMENTS[number - 1] in state else f"state{number}"
    value = state.get(name)
    _check(isinstance(value, torch.Tensor), key, f"has keys {sorted(map(str, state))}", "exp_avg or state1, and so on")
    _check(value.shape == p.shape, key, f"{name} has shape {tuple(value.shape)}", f"the parameter's {tuple(p.shape)}")
    if value.dtype != torch.uint8:
        _check(value.is_floating_point(), key, f"{name} is {value.dtype}", "a float, or uint8")
        return {"values": value}
    absmax, qmap = state.get(f"absmax{number}"), state.get(f"qmap{number}")
    blocks = -(p.numel() // -BLOCK)
    for part, tensor, size in ((f"absmax{number}", absmax, blocks), (f"qmap{number}", qmap, 256)):
        _check(isinstance(tensor, torch.Tensor), key, f"{name} is 8-bit without {part}", "both")
        _check(
            tensor.numel() == size and tensor.is_floating_point(), key,
            f"{part} is {tensor.dtype} with {tensor.numel()} values", f"{size} float32 for {p.numel()} codes",
        )  # fmt: skip
    qmap = qmap.to(p.device, torch.float32).reshape(256)
    _check(bool((qmap.diff() >= 0).all()), key, f"qmap{number} is not ascending", "256 ascending levels")
    value = value.to(p.device)
    if not torch.ops.aten.is_non_overlapping_and_dense(value):
        value = value.contiguous()
    return {"codes": value, "absmax": absmax.to(p.device, torch.float32).reshape(-1), "qmap": qmap}


def state_for(
    p: torch.Tensor,
    saved: dict[str, Any],
    key: Any,
    *,
    bits8: bool,
    master: bool,
    maps: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The state for p: copies on p's device and in p's layout, codes where bits8 and fp32 otherwise.

    Codes stay what they are, with the map they were saved with (the shared one of `maps` where it is equal); fp32
    moments of p are encoded and codes decoded where the precision is another.
    """
    saved = {**saved, **saved.get(_BNB_NESTED, {})}
    if not saved.keys() - {_BNB_NESTED}:
        return {}
    _check("max_exp_avg_sq" not in saved, key, "comes from amsgrad=True", "amsgrad=False; use torch.optim.AdamW for it")
    step = saved.get("step")
    _check(step is not None, key, "has no step", "a number or a tensor of one")
    step = step if isinstance(step, torch.Tensor) else torch.tensor(float(step))
    _check(step.numel() == 1, key, f"step has {step.numel()} values", "one")
    state = {"step": step.detach().reshape(()).to(p.device, torch.float32, copy=True)}
    for number in (1, 2):
        moment = _moment(p, saved, key, number)
        if "codes" in moment and bits8 and _same_order(moment["codes"], p):
            shared = maps[number - 1]
            state[f"state{number}"] = _placed(moment["codes"], p, torch.uint8)
            state[f"absmax{number}"] = moment["absmax"].clone()
            state[f"qmap{number}"] = shared if torch.equal(moment["qmap"], shared) else moment["qmap"].clone()
            continue
        if "codes" in moment:
            values = torch.empty_like(moment["codes"], dtype=torch.float32)
            _in_memory_order(values).copy_(
                dequantize_moment(_in_memory_order(moment["codes"]), moment["absmax"], moment["qmap"])
            )
        else:
            values = moment["values"]
        values = _placed(values, p, torch.float32)
        if not bits8:
            state[_MOMENTS[number - 1]] = values
            continue
        codes, absmax = quantize_moment(_in_memory_order(values), maps[number - 1])
        placed = torch.empty_like(p, dtype=torch.uint8)
        _in_memory_order(placed).copy_(codes)
        state |= {f"state{number}": placed, f"absmax{number}": absmax, f"qmap{number}": maps[number - 1]}
    if master:
        known = saved.get("master")
        _check(known is None or known.shape == p.shape, key, "master has another shape", f"{tuple(p.shape)}")
        state["master"] = _placed(p if known is None else known, p, torch.float32)
    return state
