"""How an op reaches torch: schema, CPU and CUDA implementations, fake, autograd and autocast rule, in one call.

Every call travels the same way: `pyfastpeft.ops.f` (unpacks and checks) → `torch.ops.pyfastpeft.f.default` (this file)
→ `pyfastpeft._C` (raw pointers). Always through the dispatcher: an autograd.Function that called the binding itself
would hand it the null pointers of fake tensors and hide the op from compile, checkpointing policies and FLOP counters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("pyfastpeft", "DEF")

# csrc/common/dtype.h: enum DType
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dtype_code(dtype: torch.dtype, op: str, name: str) -> int:
    """The binding's code of a floating-point dtype; TypeError names the op and the argument otherwise."""
    try:
        return DTYPE_CODES[dtype]
    except KeyError:
        raise TypeError(
            f"{op}: {name} has dtype {dtype}, expected float32, float16 or bfloat16; convert it with .to(dtype)"
        ) from None


def register_op(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    cuda: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Callable | None = None,
    tags: tuple = (),
) -> Callable:
    """Registers `pyfastpeft::<schema>` and returns its OpOverload.

    cpu, cuda      the implementations, called below autograd with real tensors of that device
    fake           shapes and dtypes of the outputs from those of the inputs; no data is read
    setup_context, backward   as in torch.library.register_autograd
    autocast       called with (dtype, *args, **kwargs) under autocast; returns (args, kwargs) with the casts made
    """
    LIBRARY.define(schema, tags=tags)
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"pyfastpeft::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"pyfastpeft::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.pyfastpeft, base), overload or "default")
    if autocast is not None:
        _register_autocast(name, op, autocast)
    return op


def _register_autocast(name: str, op: Callable, rule: Callable) -> None:
    for device in ("cpu", "cuda"):
        key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

        def redispatch(*args, _device=device, _key=key, **kwargs):
            args, kwargs = rule(torch.get_autocast_dtype(_device), *args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*args, **kwargs)

        LIBRARY.impl(name, redispatch, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device])
