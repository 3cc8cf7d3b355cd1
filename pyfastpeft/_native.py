"""The compiled module, loaded after torch so that both share one OpenMP runtime.

`_C` is compiled with -fopenmp but linked against no OpenMP library: its symbols resolve to the libgomp that
`import torch` has put into the process, and `torch.set_num_threads` then governs our loops too. Linking the system's
libgomp instead would give the process a second pool of threads that competes with torch's for the cores.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import types
import warnings
from pathlib import Path

import torch

__all__ = ["_C", "openmp_libraries", "require_cuda"]


def openmp_libraries() -> list[str]:
    """The files of the OpenMP runtimes in this process (GNU's libgomp, Intel's libiomp5, LLVM's libomp)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp|omp)[^/\s]*\.so\S*)", maps)))


def _load() -> types.ModuleType:
    try:
        return importlib.import_module("pyfastpeft._C")
    except ImportError as error:
        if not re.search("undefined symbol: (GOMP|omp)_", str(error)):
            raise
        offer_openmp(str(error))
        return importlib.import_module("pyfastpeft._C")


def offer_openmp(error: str) -> None:
    """Makes a GNU OpenMP runtime's symbols visible to `_C`, for a torch that has not done so.

    torch's own, when it is in the process; the system's, with a warning, when there is none; ImportError without either.
    """
    ours = [file for file in openmp_libraries() if os.path.basename(file).startswith("libgomp")]
    for file in sorted(ours, key=lambda file: not file.startswith(os.path.dirname(os.path.dirname(torch.__file__)))):
        ctypes.CDLL(file, mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
        return
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL)
    except OSError as missing:
        raise ImportError(
            f"pyfastpeft needs GNU OpenMP: torch {torch.__version__} brings none ({error}), and the system has none "
            f"({missing}); install it (Debian, Ubuntu: apt install libgomp1)"
        ) from None
    warnings.warn(
        f"torch {torch.__version__} does not use GNU OpenMP, so pyfastpeft uses the system's: two pools of threads, and "
        "torch.set_num_threads does not govern pyfastpeft's (OMP_NUM_THREADS does); `pyfastpeft doctor` shows both",
        RuntimeWarning,
        stacklevel=3,
    )


_C = _load()


def require_cuda(op: str) -> types.ModuleType:
    """`_C`, if it holds CUDA kernels; RuntimeError with the reason why it does not and the way out otherwise."""
    info = _C.build_info()
    if not info["cuda"]:
        raise RuntimeError(
            f"{op}: this build of pyfastpeft has no CUDA kernels: {info['no_cuda_reason']}; then "
            "reinstall pyfastpeft, or move the tensors to the CPU"
        )
    return _C
