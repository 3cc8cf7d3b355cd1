"""How an op reaches torch: schema, CPU and CUDA implementations, fake, autograd and autocast rule, in one call.

Every call travels the same way: `pyfastpeft.ops.f` (unpacks and checks) → `torch.ops.pyfastpeft.f.default` (this file)
→ `pyfastpeft._C` (raw pointers). Always through the dispatcher: an autograd.Function that called the binding itself
would hand it the null pointers of fake tensors and hide the op from compile, checkpointing policies and FLOP counters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
from torch._C._functorch import unwrap_if_dead
from torch._functorch.utils import enable_single_level_autograd_function

LIBRARY = torch.library.Library("pyfastpeft", "DEF")

# By op name, where there is one: tests run these without a GPU, on the host executor of tests/emu.
CUDA_IMPLEMENTATIONS: dict[str, Callable] = {}

# By op: what the dispatcher calls for autograd, `gradient_by`'s way to it.
_AUTOGRAD_KERNELS: dict[Callable, Callable] = {}

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
    no_gradient: str | None = None,
    gradient_by: Callable | None = None,
    tags: tuple = (),
) -> Callable:
    """Registers `pyfastpeft::<schema>` and returns its OpOverload.

    cpu, cuda      the implementations, called below autograd with real tensors of that device
    fake           shapes and dtypes of the outputs from those of the inputs; no data is read
    setup_context, backward   as in torch.library.register_autograd; tensors among the positional arguments, lists of them
                   too (backward then returns a list)
    no_gradient    instead of a backward: why there is none; the RuntimeError that backpropagating through it raises says so
    gradient_by    instead of a backward: an op registered with one, of the same arguments, whose first result is this
                   op's and whose others are what its backward wants of the forward. It is called instead wherever a
                   gradient is wanted, so policies, traces and compiled graphs of training show that op
    autocast       called with (dtype, *args, **kwargs) under autocast; returns (args, kwargs) with the casts made
    """
    LIBRARY.define(schema, tags=tags)
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
        CUDA_IMPLEMENTATIONS[name] = cuda
    torch.library.register_fake(f"pyfastpeft::{name}", fake, lib=LIBRARY)
    if no_gradient is not None:
        setup_context, backward = _refuse(name, no_gradient)
    if backward is not None:
        _register_autograd(name, setup_context, backward)
    if gradient_by is not None:
        _register_autograd_by(name, _AUTOGRAD_KERNELS[gradient_by])
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.pyfastpeft, base), overload or "default")
    if autocast is not None:
        _register_autocast(name, op, autocast)
    return op


def _refuse(name: str, reason: str) -> tuple[Callable, Callable]:
    # without a node of its own the result would come out as a constant, and gradients would be wrong in silence
    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: {reason}")

    return (lambda ctx, inputs, output: None), backward


def _some_requires_grad(*args) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


_any_requires_grad = getattr(torch._C, "_any_requires_grad", _some_requires_grad)  # torch 2.6 does not have it yet


def _register_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    """torch.library.register_autograd, but also under torch.func: its generated Function refuses functorch's transforms.

    The dispatcher calls this kernel once per level of grad, with that level's wrappers; a Function for a single level
    is all that is needed there.
    """
    op = torch._library.utils.lookup_op(f"pyfastpeft::{name}")
    # the dispatcher leaves trailing arguments out where they equal their defaults
    defaults = tuple(a.default_value if a.has_default_value() else None for a in op._schema.arguments)

    lists = [i for i, a in enumerate(op._schema.arguments) if re.search("List.*Tensor", str(a.type))]

    def below(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    if lists:
        _register_autograd_of_lists(name, lists, below, setup_context, backward)
        return

    class Differentiable(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(*args):
            *args, keyset = args
            if not torch._C._are_functorch_transforms_active():
                return below(keyset, args)
            with torch.enable_grad():  # of the next level: a Function's forward runs without
                return below(keyset, args)

        @staticmethod  # apart from forward: torch 2.15 demands it under torch.func
        def setup_context(ctx, inputs, output):
            *args, _ = inputs
            setup_context(ctx, (*args, *defaults[len(args) :]), output)

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            return (*result, None) if isinstance(result, tuple) else (result, None)

    Differentiable.__name__ = Differentiable.__qualname__ = f"{name}_autograd"
    apply = Differentiable.apply

    def kernel(keyset, *args):
        if not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            return below(keyset, args)
        if not torch._C._are_functorch_transforms_active():
            return apply(*[unwrap_if_dead(a) if isinstance(a, torch.Tensor) else a for a in args], keyset)
        with enable_single_level_autograd_function():
            return apply(*args, keyset)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    _AUTOGRAD_KERNELS[op] = kernel


def _register_autograd_by(name: str, differentiable: Callable) -> None:
    op = torch._library.utils.lookup_op(f"pyfastpeft::{name}")

    def kernel(keyset, *args):
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return differentiable(keyset, *args)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _register_autograd_of_lists(
    name: str, lists: list[int], below: Callable, setup_context: Callable, backward: Callable
) -> None:
    """An autograd.Function sees the tensors among its arguments and not those of a list: the lists are taken apart."""

    def flat(args) -> list:
        return [item for i, arg in enumerate(args) for item in (arg if i in lists else (arg,))]

    def nested(items, sizes: list[int | None]) -> tuple:
        items = iter(items)
        return tuple(next(items) if size is None else [next(items) for _ in range(size)] for size in sizes)

    class Differentiable(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(*args):
            *args, sizes, keyset = args
            return below(keyset, nested(args, sizes))

        @staticmethod
        def setup_context(ctx, inputs, output):
            *args, sizes, _ = inputs
            ctx.sizes = sizes
            setup_context(ctx, nested(args, sizes), output)

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            gradients = [
                item
                for size, value in zip(ctx.sizes, result, strict=True)
                for item in ([value] if size is None else [None] * size if value is None else value)
            ]
            return (*gradients, None, None)

    Differentiable.__name__ = Differentiable.__qualname__ = f"{name}_autograd"

    def kernel(keyset, *args):
        if not torch.is_grad_enabled():
            return below(keyset, args)
        tensors = flat(args)
        if not _any_requires_grad(*tensors):
            return below(keyset, args)
        sizes = [len(arg) if i in lists else None for i, arg in enumerate(args)]
        tensors = [unwrap_if_dead(t) if isinstance(t, torch.Tensor) else t for t in tensors]
        if not torch._C._are_functorch_transforms_active():
            return Differentiable.apply(*tensors, sizes, keyset)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*tensors, sizes, keyset)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _register_autocast(name: str, op: Callable, rule: Callable) -> None:
    for device in ("cpu", "cuda"):
        key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

        def redispatch(*args, _device=device, _key=key, **kwargs):
            args, kwargs = rule(torch.get_autocast_dtype(_device), *args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_key)):
                return op(*args, **kwargs)

        LIBRARY.impl(name, redispatch, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device])


def vmap_by_loop(op: Callable, info, in_dims: tuple, *args):
    """The batching rule of any op with tensor results: one call per element, stacked."""
    calls = []
    for i in range(info.batch_size):
        picked = (a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
        calls.append(op(*picked))
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(each) for each in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


def register_vmap(op: Callable, rule: Callable | None = None) -> None:
    """torch.library.register_vmap's rule(info, in_dims, *args); without one, vmap_by_loop."""
    if rule is None:
        rule = functools.partial(vmap_by_loop, op)
    torch.library.register_vmap(op, rule, lib=LIBRARY)
