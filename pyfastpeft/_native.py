"""The compiled module, loaded after torch so that both share one OpenMP runtime.

`_C` is compiled with -fopenmp but linked against no OpenMP library: its symbols resolve to the libgomp that
`import torch` has put into the process, and `torch.set_num_threads` then governs our loops too. Linking the system's
libgomp instead would give the process a second pool of threads that competes with torch's for the cores.
"""

from __future__ import annotations

import ctypes
import importlib
import types
import warnings

import torch  # noqa: F401  (first: it loads the OpenMP runtime)

__all__ = ["_C", "require_cuda"]


def _load() -> types.ModuleType:
    try:
        return importlib.import_module("pyfastpeft._C")
    except ImportError as error:
        # "undefined symbol: GOMP_parallel": this torch keeps its OpenMP runtime to itself, or uses another one
        if "undefined symbol: GOMP_" not in str(error) and "undefined symbol: omp_" not in str(error):
            raise
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        except OSError as missing:
            raise ImportError(
                f"pyfastpeft needs GNU OpenMP: torch {torch.__version__} offers none to other modules ({error}), and "
                f"the system has none ({missing}); install it (Debian, Ubuntu: apt install libgomp1)"
            ) from None
        warnings.warn(
            f"torch {torch.__version__} offers no GNU OpenMP to other modules, so pyfastpeft uses the system's: two "
            "pools of threads, and torch.set_num_threads does not govern pyfastpeft's (OMP_NUM_THREADS does); "
            "`pyfastpeft doctor` shows both",
            RuntimeWarning,
            stacklevel=2,
        )
        return importlib.import_module("pyfastpeft._C")


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
