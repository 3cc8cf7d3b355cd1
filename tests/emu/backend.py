"""Puts the CUDA implementations of all ops, run by the host executor, in the place of the CPU ones."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import torch
from emu import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyfastpeft.ops import _cuda, _library


class _Module:
    """The emulated module as an op sees it: what a binding registered is forgotten when its call is over."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str):
        member = getattr(self._module, name)
        if not callable(member):
            return member

        def call(*args, **kwargs):
            try:
                result = member(*args, **kwargs)
            finally:
                self._module.emu_forget_ranges()
            self._module.emu_raise_reports()  # those of a launcher; those of a kernel have been raised
            return result

        setattr(self, name, call)
        return call


# Ops that may read a value on the host. Any other that did would wait for the GPU and break CUDA graphs.
MAY_SYNC = {"quantize_4bit", "quantize_absmax"}  # for the error that names a NaN
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class _Watch(TorchDispatchMode):
    """Follows an implementation's torch calls: refuses those that wait for the GPU, and tells the executor which memory
    came from torch.empty and its kin and was not filled by torch since."""

    def __init__(self, module: types.ModuleType, op: str):
        super().__init__()
        self.module, self.op = module, op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in SYNCS and self.op not in MAY_SYNC:
            raise self.module.Report(
                f"SYNC: {self.op}'s CUDA implementation calls {func._schema.name} (.item(), a condition on a tensor, …), "
                "which waits for the GPU; hand the kernel the tensor's address instead"
            )
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        fresh = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        for returned, value in zip(func._schema.returns, _as_tuple(result), strict=False):
            is_view = returned.alias_info is not None and not returned.alias_info.is_write
            if not is_view:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor):
                        self._mark(tensor, fresh, in_place=returned.alias_info is not None)
        return result

    def _mark(self, tensor: torch.Tensor, fresh: bool, in_place: bool) -> None:
        begin, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if in_place:  # only what the tensor spans of its storage
            begin, size = tensor.data_ptr(), _span(tensor)
        (self.module.emu_mark_fresh if fresh else self.module.emu_mark_filled)(begin, size)

    def check_written(self, result) -> None:
        for i, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, torch.Tensor) and tensor.is_contiguous():
                hole = self.module.emu_first_unwritten(tensor.data_ptr(), _span(tensor))
                if hole >= 0:
                    raise self.module.Report(
                        f"UNWRITTEN output: {self.op} returned {tensor.dtype} {tuple(tensor.shape)} as result {i}, and nobody "
                        f"wrote its byte {hole} (value {hole // tensor.itemsize}) since torch.empty"
                    )


def _as_tuple(result) -> tuple:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first value to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def checked(op: str, implementation: Callable, module: types.ModuleType, depth: list[int]) -> Callable:
    def run(*args, **kwargs):
        depth[0] += 1
        try:
            with _Watch(module, op) as watch:
                result = implementation(*args, **kwargs)
            watch.check_written(result)
            return result
        finally:
            depth[0] -= 1
            if depth[0] == 0:  # an op called by another's implementation leaves the outer one's allocations alone
                module.emu_forget_fresh()

    return run


def _helpers(module: types.ModuleType) -> dict[str, Callable]:
    """What the functions of pyfastpeft/ops/_cuda.py answer for the executor."""
    executor = _Module(module)

    def target(tensor: torch.Tensor, op: str) -> _cuda.Target:
        assert tensor.device.type == "cpu", f"{op}: an emulated test works on CPU tensors, got one on {tensor.device}"
        return _cuda.Target(executor, 0, 0)

    return {
        "target": target,
        "multiprocessors": lambda *args: 4,
        "capability": lambda *args: (9, 0),
        "is_capturing": lambda *args: False,
    }


@contextlib.contextmanager
def emulated(module: types.ModuleType | None = None, seed: int = 0, preempt: int = 0) -> Iterator[types.ModuleType]:
    """Within it, CUDA implementations run on CPU tensors; whatever the executor finds is raised as its Report."""
    module = module or build.load()
    module.emu_configure(seed, preempt)
    helpers = _helpers(module)
    unknown = [
        n for n, f in vars(_cuda).items() if isinstance(f, types.FunctionType) and f.__module__ == _cuda.__name__
    ]
    unknown = [name for name in unknown if name not in helpers and not name.startswith("_")]
    assert not unknown, (
        f"tests/emu/backend.py does not know what {unknown} of pyfastpeft.ops._cuda answer for the executor"
    )
    former = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the executor has one; torch's others would only spin between small operations
    library = torch.library.Library("pyfastpeft", "IMPL")
    try:
        for name, helper in helpers.items():
            original = getattr(_cuda, name, None)
            for other in [m for n, m in sys.modules.items() if n.startswith("pyfastpeft.")]:
                if original is not None and vars(other).get(name) is original:
                    former.append((other, name, original))
                    setattr(other, name, helper)
        depth = [0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            for name, implementation in _library.CUDA_IMPLEMENTATIONS.items():
                # below Library.impl, which in older torch refuses to replace a kernel
                library.m.impl(f"pyfastpeft::{name}", "CPU", checked(name, implementation, module, depth), False)
        yield module
    finally:
        library._destroy()
        torch.set_num_threads(threads)
        for other, name, original in former:
            setattr(other, name, original)
        module.emu_forget_fresh()
        module.emu_configure()
