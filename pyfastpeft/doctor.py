"""What runs where, and what stands in the way: the report behind `pyfastpeft doctor`, for users and bug reports.

Reading it must work on any machine the package imports on: what is missing is said, never raised.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from pyfastpeft._native import _C, openmp_libraries
from pyfastpeft.build_info import CPU_ISAS, build_info

PACKAGES = (
    "torch", "transformers", "safetensors", "numpy", "typer", "rich", "matplotlib", "peft", "bitsandbytes", "accelerate",
)  # fmt: skip


def report() -> dict[str, Any]:
    """Everything `print_report` shows, as plain values (it can go into JSON):

    versions   {"python", "pyfastpeft", "torch", ...}: None where a package is not installed
    build      pyfastpeft.build_info()
    cpu        model, cores this process may use, instruction set detected and used, threads of torch and of the kernels
    openmp     the OpenMP libraries in the process, the one our kernels use, and whether torch's thread count governs it
    cuda       what is compiled in, driver, torch's CUDA, and each GPU with how our kernels reach it
    kernels    [{"kernel", "cpu", "cuda", "cuda_built"}]: the variant of each kernel that runs here
    ops        [{"op", "cpu", "cuda", "cuda_built"}]: where each op of torch.ops.pyfastpeft runs here
    problems   [{"problem", "fix"}]: empty when all is well
    """
    build = build_info()
    result: dict[str, Any] = {
        "versions": _versions(build),
        "build": build,
        "cpu": _cpu(),
        "openmp": _openmp(),
        "cuda": _cuda(build),
    }
    result["kernels"] = [
        {
            "kernel": name,
            "cpu": _cpu_variant(variants, result["cpu"]["isa_used"]),
            "cuda": "cuda" in variants and result["cuda"]["usable"],
            "cuda_built": "cuda" in variants,
        }
        for name, variants in build["kernels"].items()
    ]
    result["ops"] = _ops(result["cuda"])
    result["problems"] = _problems(result)
    return result


def _versions(build: dict) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "pyfastpeft": build["version"] + (f" ({build['commit']})" if build["commit"] else ""),
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpuinfo(key: str) -> str:
    try:
        found = re.search(rf"^{key}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else ""


def _cpu_limit() -> float | None:
    """How many cores' worth of time the container's cgroup grants; None: no limit, or none that can be read."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _cpu() -> dict[str, Any]:
    return {
        "model": _cpuinfo("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "core_limit": _cpu_limit(),
        "isa_detected": _C.detected_cpu_isa(),
        "isa_used": _C.cpu_isa(),
        "isa_forced": os.environ.get("PYFASTPEFT_CPU_ISA") or None,
        "torch_threads": torch.get_num_threads(),
        "kernel_threads": _C.max_threads(),
    }


def _cpu_variant(variants: list[str], isa: str) -> str | None:
    usable = [v for v in variants if v in CPU_ISAS and CPU_ISAS.index(v) <= CPU_ISAS.index(isa)]
    return max(usable, key=CPU_ISAS.index) if usable else None


def _ops(cuda: dict) -> list[dict[str, Any]]:
    """One row per op, its overloads together: on which devices it has an implementation, and whether one can run."""
    importlib.import_module("pyfastpeft.ops")
    overloads: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("pyfastpeft::"):
            overloads.setdefault(name.split("::")[1].split(".")[0], []).append(name)

    def has(op: str, device: str) -> bool:
        return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, device) for name in overloads[op])

    rows = []
    for op in sorted(overloads):
        built = cuda["built"] and has(op, "CUDA")
        rows.append({"op": op, "cpu": has(op, "CPU"), "cuda": built and cuda["usable"], "cuda_built": built})
    return rows


def _on_cuda(row: dict[str, Any]) -> str:
    return "yes" if row["cuda"] else "compiled in, no GPU to run on" if row["cuda_built"] else "no"


def torch_governs_threads() -> bool:
    """Whether torch.set_num_threads changes how many threads our kernels use: one pool, not two.

    Tried, not deduced: a thread count is set and put back.
    """
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(former + 1)
        return _C.max_threads() == former + 1
    finally:
        torch.set_num_threads(former)


def _openmp() -> dict[str, Any]:
    return {
        "libraries": openmp_libraries(),
        "used_by_kernels": _C.openmp_library(),
        "shared_with_torch": torch_governs_threads(),
    }


def gpu_route(archs: list[str], capability: tuple[int, int]) -> str | None:
    """How kernels compiled for `archs` reach a GPU: "native", "PTX" (compiled when loaded) or None.

    Machine code runs on later minor releases of its major one; code with an "a" suffix on exactly its own GPU.
    """
    major, minor = capability
    route = None
    for arch in archs:
        found = re.fullmatch(r"(\d+)(\d)([a-z]?)(\+PTX)?", arch)
        if not found:
            continue
        compiled = (int(found[1]), int(found[2]))
        same_major = compiled[0] == major and compiled[1] <= minor
        if found[4]:
            route = "PTX" if compiled <= (major, minor) else route
        elif compiled == (major, minor) or (same_major and not found[3]):
            return "native"
    return route


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_version() -> str | None:
    """NVIDIA's own number for the driver ("580.65.06"), which package managers use; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else None


def _cuda(build: dict) -> dict[str, Any]:
    status = _C.cuda_status()
    driver = status.get("driver_version") or 0
    devices = []
    for device in status.get("devices", ()):
        route = gpu_route(build["cuda_archs"], device["capability"])
        devices.append({**device, "capability": list(device["capability"]), "route": route})
    return {
        "built": status["built"],
        "runtime": _release(status["runtime_version"]) if status["built"] else None,
        "driver": _driver_version(),
        "driver_cuda": _release(driver) if driver else None,
        "error": status.get("error") or None,
        "torch_cuda": torch.version.cuda,
        "torch_sees": torch.cuda.device_count(),
        "devices": devices,
        "usable": any(d["route"] for d in devices),
    }


def _driver_fix(error: str, minimum_driver: str) -> str:
    if error.startswith("cudaErrorNoDevice"):
        return "see whether nvidia-smi lists a GPU and what CUDA_VISIBLE_DEVICES hides"
    if error.startswith("cudaErrorSystemDriverMismatch"):
        return "reboot: the driver in the kernel and its libraries are of different releases"
    return f"install NVIDIA driver {minimum_driver} or newer, or rebuild with an older CUDA toolkit on PATH"


def _problems(r: dict[str, Any]) -> list[dict[str, str]]:
    cpu, openmp, cuda, build = r["cpu"], r["openmp"], r["cuda"], r["build"]
    problems: list[dict[str, str]] = []

    def add(problem: str, fix: str) -> None:
        problems.append({"problem": problem, "fix": fix})

    if not openmp["shared_with_torch"]:
        add(
            f"two pools of threads: torch.set_num_threads does not govern pyfastpeft's kernels, which use "
            f"{openmp['used_by_kernels']}",
            "set OMP_NUM_THREADS to half the cores, or install torch from PyPI, whose OpenMP runtime is shared",
        )
    if CPU_ISAS.index(cpu["isa_used"]) < CPU_ISAS.index(cpu["isa_detected"]):
        add(
            f"the CPU kernels use {cpu['isa_used']} although this machine has {cpu['isa_detected']}",
            "unset PYFASTPEFT_CPU_ISA",
        )
    if "amx_tile" in _cpuinfo("flags").split() and cpu["isa_detected"] != "amx":
        add("the CPU has AMX, but the kernel refuses it to this process", "use Linux 5.16 or newer")
    if cpu["torch_threads"] > cpu["cores"]:
        add(
            f"torch uses {cpu['torch_threads']} threads on {cpu['cores']} cores",
            f"set OMP_NUM_THREADS={cpu['cores']} or call torch.set_num_threads({cpu['cores']})",
        )
    if cpu["core_limit"] is not None and cpu["torch_threads"] > max(1, round(cpu["core_limit"])):
        limit = max(1, round(cpu["core_limit"]))
        add(
            f"the container is granted {cpu['core_limit']:g} cores of time, torch uses {cpu['torch_threads']} threads",
            f"set OMP_NUM_THREADS={limit}, or raise the container's limit",
        )
    if not cuda["built"]:
        if cuda["torch_sees"]:
            add(
                "there is a GPU, but this is a CPU build of pyfastpeft",
                f"{build['cuda_why_not']}; then reinstall pyfastpeft",
            )
        return problems
    if cuda["driver_cuda"] and cuda["error"]:
        add(
            f"the CUDA runtime {cuda['runtime']} in pyfastpeft reports {cuda['error']} "
            f"(driver {cuda['driver'] or 'for CUDA ' + cuda['driver_cuda']})",
            _driver_fix(cuda["error"], build["minimum_driver"]),
        )
    for device in cuda["devices"]:
        if device["route"] is None:
            major, minor = device["capability"]
            add(
                f"{device['name']} (compute capability {major}.{minor}) is not among the architectures of this build: "
                f"{', '.join(build['cuda_archs'])}",
                f'rebuild with PYFASTPEFT_CUDA_ARCHS="{major}{minor}" (the default includes 75 and newer)',
            )
    if cuda["devices"] and torch.version.cuda is None:
        add("there is a GPU, but torch is a CPU build", "install a CUDA build of torch")
    return problems


def print_report(result: dict[str, Any] | None = None, console: Any = None) -> None:
    """Prints `report()` (or an earlier one) as tables; console: a rich.console.Console, None for standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    result = report() if result is None else result
    console = console or Console()

    def table(title: str, rows: list[tuple[str, Any]]) -> None:
        grid = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(str(value)))
        console.print(grid)
        console.print()

    table("Versions", [(name, value or "not installed") for name, value in result["versions"].items()])
    cpu, openmp, cuda, build = result["cpu"], result["openmp"], result["cuda"], result["build"]
    limit = f", limited to {cpu['core_limit']:g} cores of time" if cpu["core_limit"] is not None else ""
    forced = f" (PYFASTPEFT_CPU_ISA={cpu['isa_forced']})" if cpu["isa_forced"] else ""
    table(
        "CPU",
        [
            ("model", cpu["model"]),
            ("cores", f"{cpu['cores']}{limit}"),
            ("instruction set", f"{cpu['isa_used']}{forced}; this machine has {cpu['isa_detected']}"),
            ("threads", f"torch {cpu['torch_threads']}, kernels {cpu['kernel_threads']}"),
            ("OpenMP of the kernels", openmp["used_by_kernels"]),
            ("OpenMP in the process", "\n".join(openmp["libraries"]) or "unknown"),
            ("thread pools", "one, shared with torch" if openmp["shared_with_torch"] else "two"),
        ],
    )
    gpu = [
        (f"GPU {i}", f"{d['name']}, {d['capability'][0]}.{d['capability'][1]}, {d['memory_bytes'] / 2**30:.0f} GiB: "
         f"{'not in this build' if d['route'] is None else 'kernels are ' + d['route']}")
        for i, d in enumerate(cuda["devices"])
    ]  # fmt: skip
    if cuda["built"]:
        compiled = (
            f"{build['cuda']} for {', '.join(build['cuda_archs'])}; needs driver {build['minimum_driver']} or newer"
        )
    else:
        compiled = f"no: {build['cuda_why_not']}"
    driver = cuda["driver"] or "none"
    if cuda["driver_cuda"]:
        driver += f" (up to CUDA {cuda['driver_cuda']})"
    table(
        "CUDA",
        [
            ("compiled in", compiled),
            ("CUDA runtime", f"{cuda['runtime']}, linked statically" if cuda["built"] else "none"),
            ("driver", driver),
            ("torch's CUDA", cuda["torch_cuda"] or "none: a CPU build"),
            *(gpu or [("GPU", "none" if not cuda["error"] else f"none ({cuda['error']})")]),
        ],
    )
    for title, first, rows in (
        ("Ops, and where they run here", "op", result["ops"]),
        ("Kernels that run here", "kernel", result["kernels"]),
    ):
        grid = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for heading in (first, "CPU", "CUDA"):
            grid.add_column(heading, style="cyan" if heading == first else None)
        for row in rows:
            on_cpu = row["cpu"] or "none"
            grid.add_row(row[first], "yes" if on_cpu is True else on_cpu, _on_cuda(row))
        console.print(grid)
        console.print()
    if not result["problems"]:
        console.print(Text("No known problem found.", style="green"))
    for entry in result["problems"]:
        console.print(Text("Problem: ", style="bold red") + Text(entry["problem"], style="default"))
        console.print(Text("    Fix: ", style="bold green") + Text(entry["fix"], style="default"))
