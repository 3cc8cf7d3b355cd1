"""AdamW over lists of tensors as one torch op. Maths: pyfastpeft/reference/adamw.py; kernels: csrc/adamw."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from operator import eq

import torch

from pyfastpeft._native import _C
from pyfastpeft.ops import _cuda
from pyfastpeft.ops._library import DTYPE_CODES, LIBRARY, dtype_code, register_op
from pyfastpeft.reference.adamw import BLOCK
from pyfastpeft.reference.nf4 import dynamic_map

_SCHEMA = """adamw_(
Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps,
Tensor(e!)[] absmax1, Tensor(f!)[] absmax2, Tensor(g!)[] masters, *,
float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, int state_bits,
Tensor? qmap1=None, Tensor? qmap2=None, Tensor? lr_tensor=None,
Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? rounding_seed=None) -> ()"""

# Read through the descriptors, so that a list of ten thousand tensors is walked in C.
_data_ptr = torch.Tensor.data_ptr
_numel = torch.Tensor.numel
_is_contiguous = torch.Tensor.is_contiguous
_shape = torch.Tensor.shape.__get__
_dtype = torch.Tensor.dtype.__get__
_device = torch.Tensor.device.__get__

_BITS8, _MASTER = 16, 32  # csrc/adamw/adamw_bind.cpp: kinds


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same dense layout: the i-th value in memory is the same element of both."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)


def _fail(index: int, name: str, got: str, expected: str, error: type[Exception] = ValueError):
    raise error(f"adamw_: {name}[{index}] {got}, expected {expected}")


def _kind(i, param, grad, exp_avg, exp_avg_sq, step, absmax1, absmax2, master, state_bits) -> int:
    """Checks tensor i with all that belongs to it; returns its kind for the binding."""
    code = dtype_code(param.dtype, "adamw_", f"params[{i}]")
    if grad.dtype not in (param.dtype, torch.float32):
        _fail(i, "grads", f"has dtype {grad.dtype}", f"float32 or params[{i}]'s {param.dtype}", TypeError)
    bits8 = exp_avg.dtype == torch.uint8
    if bits8 and state_bits == 32:
        _fail(i, "exp_avgs", "is 8-bit (uint8)", "float32 with state_bits=32; pass state_bits=8", TypeError)
    state_dtype = torch.uint8 if bits8 else torch.float32
    for name, state in (("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)):
        if state.dtype != state_dtype:
            _fail(i, name, f"has dtype {state.dtype}", "float32, or uint8 for both moments", TypeError)
    has_master = master is not None and (master.numel() > 0 or param.numel() == 0)
    if has_master and master.dtype != torch.float32:
        _fail(i, "masters", f"has dtype {master.dtype}", "float32", TypeError)
    others = [("grads", grad), ("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)]
    for name, tensor in others + ([("masters", master)] if has_master else []):
        if tensor.shape != param.shape:
            _fail(i, name, f"has shape {tuple(tensor.shape)}", f"params[{i}]'s {tuple(param.shape)}")
        if not _same_layout(param, tensor):
            _fail(
                i, name, f"has strides {tensor.stride()}",
                f"params[{i}]'s {param.stride()} without gaps or overlaps; copy it with "
                "torch.empty_like(param).copy_(tensor), or make the parameter contiguous",
            )  # fmt: skip
    if step.dtype != torch.float32 or step.numel() != 1:
        _fail(i, "steps", f"is {step.dtype} with {step.numel()} values", "one float32", TypeError)
    if bits8:
        blocks = -(param.numel() // -BLOCK)
        for name, absmax in (("absmax1", absmax1), ("absmax2", absmax2)):
            if (
                absmax is None
                or absmax.dtype != torch.float32
                or absmax.numel() != blocks
                or not absmax.is_contiguous()
            ):
                got = "is missing" if absmax is None else f"is {absmax.dtype} with {absmax.numel()} values"
                _fail(i, name, got, f"{blocks} contiguous float32 (= ceil({param.numel()} / {BLOCK}))")
    return code | DTYPE_CODES[grad.dtype] << 2 | (_BITS8 if bits8 else 0) | (_MASTER if has_master else 0)


def _uniform_kind(params, grads, exp_avgs, exp_avg_sqs, steps) -> int | None:
    """The kind of all tensors where each list has one dtype and everything is contiguous fp32 state; else None."""
    dtypes = set(map(_dtype, params)), set(map(_dtype, grads))
    state_dtypes = {*map(_dtype, exp_avgs), *map(_dtype, exp_avg_sqs), *map(_dtype, steps)}
    if any(len(d) != 1 for d in dtypes) or state_dtypes != {torch.float32}:
        return None
    (param_dtype,), (grad_dtype,) = dtypes
    if param_dtype not in DTYPE_CODES or grad_dtype not in (param_dtype, torch.float32):
        return None
    for tensors in (grads, exp_avgs, exp_avg_sqs):  # streamed: lists of so many shapes would wake the garbage collector
        if not all(map(eq, map(_shape, params), map(_shape, tensors))) or not all(map(_is_contiguous, tensors)):
            return None
    if not all(map(_is_contiguous, params)) or set(map(_numel, steps)) != {1}:
        return None
    return DTYPE_CODES[param_dtype] | DTYPE_CODES[grad_dtype] << 2


def _kinds(params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, state_bits) -> bytes:
    count = len(params)
    lists = {
        "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps,
        "absmax1": absmax1, "absmax2": absmax2, "masters": masters,
    }  # fmt: skip
    for name, tensors in lists.items():
        optional = name in ("absmax1", "absmax2", "masters")
        if len(tensors) != count and not (optional and not tensors):
            raise ValueError(
                f"adamw_: {name} has {len(tensors)} tensors, expected {count}, one for each of params"
                + (" (or none at all)" if optional else "")
            )
    if state_bits not in (8, 32):
        raise ValueError(f"adamw_: state_bits is {state_bits}, expected 32 or 8")
    if not masters and count > 1:
        kind = _uniform_kind(params, grads, exp_avgs, exp_avg_sqs, steps)
        if kind is not None:
            return bytes((kind,)) * count
    none = [None] * count
    rows = zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, absmax1 or none, absmax2 or none, masters or none, strict=True
    )
    return bytes([_kind(i, *row, state_bits) for i, row in enumerate(rows)])


def _check_scalars(qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed) -> None:
    for name, tensor, numel, dtypes in (
        ("qmap1", qmap1, 256, (torch.float32,)),
        ("qmap2", qmap2, 256, (torch.float32,)),
        ("lr_tensor", lr_tensor, 1, (torch.float32, torch.float64)),
        ("grad_scale", grad_scale, 1, (torch.float32,)),
        ("found_inf", found_inf, 1, (torch.float32,)),
        ("rounding_seed", rounding_seed, 1, (torch.int64,)),
    ):
        if tensor is not None and (tensor.dtype not in dtypes or tensor.numel() != numel):
            raise TypeError(
                f"adamw_: {name} is {tensor.dtype} with {tensor.numel()} values, expected {numel} of "
                + " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            )


def _addresses(tensors: Sequence[torch.Tensor]) -> array | None:
    return array("Q", map(_data_ptr, tensors)) if tensors else None


@cache
def standard_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The signed and the unsigned dynamic map, one copy on each device for all parameters."""
    return dynamic_map(signed=True).to(device), dynamic_map(signed=False).to(device)


def _check_devices(lists: dict[str, Sequence[torch.Tensor]], scalars: dict[str, torch.Tensor | None]) -> None:
    """Everything lies where params[0] does; a learning rate may also be a CPU tensor, which is read at the call."""
    expected = lists["params"][0].device
    for name, tensors in lists.items():
        if set(map(_device, tensors)) - {expected}:
            i = next(i for i, t in enumerate(tensors) if t.device != expected)
            raise ValueError(
                f"adamw_: {name}[{i}] is on {tensors[i].device}, expected params[0]'s {expected}; move it with .to()"
            )
    for name, tensor in scalars.items():
        if (
            tensor is not None
            and tensor.device != expected
            and not (name == "lr_tensor" and tensor.device.type == "cpu")
        ):
            raise ValueError(f"adamw_: {name} is on {tensor.device}, expected the parameters' {expected}")


def _prepare(
    params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters,
    state_bits, qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed,
):  # fmt: skip
    """All checks; (the binding's arguments for the lists, qmap1, qmap2), or None where there is nothing to do."""
    kinds = _kinds(params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, state_bits)
    _check_scalars(qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed)
    if not params:
        return None
    _check_devices(
        {
            "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps,
            "absmax1": absmax1, "absmax2": absmax2, "masters": masters,
        },
        {
            "qmap1": qmap1, "qmap2": qmap2, "lr_tensor": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf,
            "rounding_seed": rounding_seed,
        },
    )  # fmt: skip
    addresses = _addresses(params)
    numels = array("q", map(_numel, params))
    if len(set(addresses)) != len(params):
        seen = {}
        for i, (address, numel) in enumerate(zip(addresses, numels, strict=True)):
            if numel and seen.setdefault(address, i) != i:
                raise ValueError(
                    f"adamw_: params[{i}] is the same memory as params[{seen[address]}], expected each tensor once; "
                    "pass a shared weight once, with the sum of its gradients"
                )
    if absmax1:
        standard = standard_maps(params[0].device)
        qmap1 = standard[0] if qmap1 is None else qmap1.contiguous()
        qmap2 = standard[1] if qmap2 is None else qmap2.contiguous()
    else:
        qmap1 = qmap2 = None
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters)
    return tables_of(lists, kinds), qmap1, qmap2


def tables_of(lists: Sequence[Sequence[torch.Tensor]], kinds: bytes | None = None) -> tuple:
    """The binding's arguments for adamw_'s eight lists, which have been checked."""
    params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters = lists
    return (
        len(params), _addresses(params), _addresses(grads), _addresses(exp_avgs), _addresses(exp_avg_sqs),
        _addresses(absmax1), _addresses(absmax2), _addresses(masters), _addresses(steps), array("q", map(_numel, params)),
        _kinds(*lists, state_bits=8 if absmax1 else 32) if kinds is None else kinds,
    )  # fmt: skip


def _mark_written(*lists: Sequence[torch.Tensor]) -> None:
    for written in lists:
        if written:
            torch.autograd.graph.increment_version(written)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _adamw_cpu(
    params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, *,
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize, state_bits,
    qmap1=None, qmap2=None, lr_tensor=None, grad_scale=None, found_inf=None, rounding_seed=None,
) -> None:  # fmt: skip
    prepared = _prepare(
        params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters,
        state_bits, qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed,
    )  # fmt: skip
    if prepared is not None:
        written = (params, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters)
        _launch_cpu(
            prepared[0], written, *prepared[1:], lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
            lr_tensor, grad_scale, found_inf, rounding_seed,
        )  # fmt: skip


def _launch_cpu(
    tables, written, qmap1, qmap2, lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
    lr_tensor, grad_scale, found_inf, rounding_seed,
) -> None:  # fmt: skip
    if found_inf is not None and found_inf.item() != 0:
        return
    _mark_written(*written)
    _C.adamw_cpu(
        *tables,
        (lr if lr_tensor is None else lr_tensor.item(), beta1, beta2, eps, weight_decay, decoupled, maximize),
        _address(qmap1), _address(qmap2), _address(rounding_seed), 1.0 if grad_scale is None else grad_scale.item(),
    )  # fmt: skip


def _adamw_cuda(
    params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, *,
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize, state_bits,
    qmap1=None, qmap2=None, lr_tensor=None, grad_scale=None, found_inf=None, rounding_seed=None,
) -> None:  # fmt: skip
    prepared = _prepare(
        params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters,
        state_bits, qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed,
    )  # fmt: skip
    if prepared is not None:
        written = (params, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters)
        _launch_cuda(
            prepared[0], written, *prepared[1:], lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
            lr_tensor, grad_scale, found_inf, rounding_seed,
        )  # fmt: skip


def _launch_cuda(
    tables, written, qmap1, qmap2, lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
    lr_tensor, grad_scale, found_inf, rounding_seed,
) -> None:  # fmt: skip
    param = written[0][0]
    if lr_tensor is not None and lr_tensor.device != param.device:
        lr, lr_tensor = lr_tensor.item(), None  # on the CPU: nothing to wait for
    target = _cuda.target(param, "adamw_")
    table, content = _device_table(param, tables, target)
    _mark_written(*written)
    target.module.adamw_cuda(
        *tables, (lr, beta1, beta2, eps, weight_decay, decoupled, maximize),
        on_device(target, qmap1, qmap2, rounding_seed, lr_tensor, grad_scale, found_inf), content, table.data_ptr(),
        table.numel(), _cuda.multiprocessors(param), target.device, target.stream,
    )  # fmt: skip


def on_device(target, qmap1, qmap2, rounding_seed, lr_tensor, grad_scale, found_inf):
    """The binding's argument for what a GPU's kernel reads from there."""
    return target.module.AdamwOnDevice(
        map1=_address(qmap1), map2=_address(qmap2), seed=_address(rounding_seed), lr_tensor=_address(lr_tensor),
        grad_scale=_address(grad_scale), found_inf=_address(found_inf),
        lr_is_f64=lr_tensor is not None and lr_tensor.dtype == torch.float64,
    )  # fmt: skip


def launch(
    tables: tuple, written: Sequence[Sequence[torch.Tensor]], qmap1: torch.Tensor | None, qmap2: torch.Tensor | None, *,
    lr: float | torch.Tensor, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool, maximize: bool,
    grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None, rounding_seed: torch.Tensor | None,
) -> None:  # fmt: skip
    """adamw_ below the dispatcher, for a list that was checked before and comes again (pyfastpeft/optim/adamw_plan.py).

    tables are those of tables_of; written[0] is params.
    """
    lr, lr_tensor = (0.0, lr) if isinstance(lr, torch.Tensor) else (lr, None)
    run = _launch_cuda if written[0][0].is_cuda else _launch_cpu
    run(
        tables, written, qmap1, qmap2, lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
        lr_tensor, grad_scale, found_inf, rounding_seed,
    )  # fmt: skip


# The kernel's list of tensors lies in device memory. For a list that comes again it is kept, with the knowledge of what
# it holds, and only what changed is sent. A captured call gets a table of its own, filled within the graph: the kept one
# may hold other lists when the graph runs.
_KEPT_TABLES = 64
_tables: OrderedDict[tuple, tuple] = OrderedDict()


def _device_table(param: torch.Tensor, tables: tuple, target: _cuda.Target) -> tuple:
    count, addresses = tables[:2]

    def new() -> tuple:
        words = target.module.adamw_table_words(count)
        return torch.empty(words, dtype=torch.int64, device=param.device), target.module.AdamwTable()

    if _cuda.is_capturing(param):
        return new()
    key = (target, count, addresses[0])  # one for each stream: on another the table may still be in use
    kept = _tables.pop(key, None) or new()
    _tables[key] = kept
    while len(_tables) > _KEPT_TABLES:
        _tables.popitem(last=False)
    return kept


def _adamw_fake(
    params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, *,
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize, state_bits,
    qmap1=None, qmap2=None, lr_tensor=None, grad_scale=None, found_inf=None, rounding_seed=None,
) -> None:  # fmt: skip
    _kinds(params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters, state_bits)
    _check_scalars(qmap1, qmap2, lr_tensor, grad_scale, found_inf, rounding_seed)


_op = register_op(" ".join(_SCHEMA.split()).replace("( ", "("), cpu=_adamw_cpu, cuda=_adamw_cuda, fake=_adamw_fake)
# An update has no derivative; without this torch walks all tensors once more to say so.
LIBRARY.impl("adamw_", torch.library.fallthrough_kernel, "Autograd")


@torch.no_grad()
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    absmax1: Sequence[torch.Tensor] = (),
    absmax2: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    *,
    lr: float | torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decoupled: bool = True,
    maximize: bool = False,
    state_bits: int = 32,
    qmap1: torch.Tensor | None = None,
    qmap2: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    rounding_seed: torch.Tensor | None = None,
) -> None:
    """One AdamW step of all tensors, in place, in one call; the maths is `pyfastpeft.reference.adamw.adamw_step`.

    g = ±grad / grad_scale;  m ← m + (1 - β1)(g - m);  v ← β2 v + (1 - β2) g²
    p ← (1 - lr · weight_decay) p - lr / (1 - β1^t) · m / (sqrt(v) / sqrt(1 - β2^t) + eps)

    params       float32, bfloat16 or float16, any shapes; contiguous, or dense with the same strides in all lists
    grads        float32 or the parameter's dtype; read only
    exp_avgs, exp_avg_sqs   m and v: float32, or (both) uint8 codes of the 8-bit dynamic maps, in blocks of 256
    steps        float32, one value each: the steps made so far; incremented
    absmax1, absmax2   float32 [ceil(n / 256)] of 8-bit m and v; no list, or one entry for each parameter (an empty
                 tensor where its state is float32)
    masters      float32 weights that low-precision parameters are rounded copies of; no list, or an entry for each
                 (empty: none)
    lr           a number, or a tensor of one value: on the CPU it is read at the call, on the parameters' GPU by the kernel
    decoupled    True: weight decay as above; False: L2, g ← g + weight_decay · p
    maximize     ascend
    state_bits   32: every state is float32; 8: states may be 8-bit
    qmap1, qmap2 float32 [256] ascending levels of the codes; None: the dynamic maps
    grad_scale, found_inf   torch.amp.GradScaler's: gradients are divided by the first; with found_inf ≠ 0 nothing is
                 changed, steps included
    rounding_seed   int64 [1]: bfloat16 and float16 parameters without a master are rounded stochastically, by Philox
                 of (seed, position, index in the list); None: to nearest

    On a GPU everything lies there (only lr may be on the CPU), all parameters are updated in one launch, nothing waits
    for the device, and the call can be captured in a CUDA graph: lr, grad_scale, found_inf and rounding_seed are read
    whenever the graph runs.

    All arithmetic is fp32 in the order of torch's own single-tensor implementation; the result does not depend on the
    thread count, the instruction set or the device. NaN and infinity go where torch's would go; an 8-bit block that meets one
    becomes NaN as a whole.

    Raises ValueError for lists, shapes or layouts that do not fit, TypeError for dtypes.
    Source: Loshchilov & Hutter, arXiv:1711.05101; 8-bit state: Dettmers et al., arXiv:2110.02861.
    """
    if not any(map(len, (params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters))):
        return  # the dispatcher needs a tensor to choose a device by
    is_tensor = isinstance(lr, torch.Tensor)
    _op(
        params, grads, exp_avgs, exp_avg_sqs, steps, absmax1, absmax2, masters,
        lr=0.0 if is_tensor else lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        decoupled=decoupled, maximize=maximize, state_bits=state_bits, qmap1=qmap1, qmap2=qmap2,
        lr_tensor=lr if is_tensor else None, grad_scale=grad_scale, found_inf=found_inf, rounding_seed=rounding_seed,
    )  # fmt: skip
