"""What this installation was built with and holds."""

from __future__ import annotations

import re

from pyfastpeft._native import _C

CPU_ISAS = ("scalar", "avx2", "avx512", "amx")  # each includes those before it: csrc/common/cpu_isa.h


def build_info() -> dict:
    """What the compiled module holds, as a dictionary:

    version          of pyfastpeft
    commit           of the git checkout it was built from; None if it was built from an archive
    compiler         name and version of the C++ compiler
    processor        the architecture, such as "x86_64"
    cuda             release of the CUDA compiler, such as "13.0.88"; None for a CPU build
    cuda_why_not     why a CPU build has no CUDA, and the way out; None otherwise
    cuda_archs       the GPU architectures inside: ["80", "90a", "90+PTX"]; later GPUs compile the PTX when it is loaded
    minimum_driver   the oldest NVIDIA driver the CUDA runtime inside accepts; None for a CPU build
    kernels          {"nf4_quantize": ["scalar", "avx2", "cuda"], ...}: every kernel and the variants compiled
    """
    raw = _C.build_info()
    return {
        "version": raw["version"],
        "commit": raw["commit"] or None,
        "compiler": raw["compiler"],
        "processor": raw["processor"],
        "cuda": raw["cuda"] or None,
        "cuda_why_not": None if raw["cuda"] else raw["no_cuda_reason"],
        "cuda_archs": list(raw["cuda_archs"]),
        "minimum_driver": _minimum_driver(raw["cuda"]),
        "kernels": kernel_variants(raw["kernel_files"]),
    }


def _minimum_driver(cuda: str) -> str | None:
    """NVIDIA's minor-version compatibility: any 13.x runtime needs the driver of 13.0, any 12.x that of 12.0."""
    if not cuda:
        return None
    return {"12": "525", "13": "580"}.get(cuda.split(".")[0], "that of CUDA " + cuda.split(".")[0] + ".0")


def kernel_variants(files: list[str]) -> dict[str, list[str]]:
    """Kernels and their variants, read from the file names, which decide what is compiled how (CMakeLists.txt)."""
    kernels: dict[str, set[str]] = {}
    for file in files:
        found = re.fullmatch(r"(?!common/)\w+/(\w+?)_(?:cpu(?:_(avx2|avx512|amx))?\.cpp|(cuda)\w*\.cu)", file)
        if found:
            name, isa, cuda = found.groups()
            kernels.setdefault(name, set()).add(cuda or isa or "scalar")
    order = [*CPU_ISAS, "cuda"]
    return {name: sorted(variants, key=order.index) for name, variants in sorted(kernels.items())}
