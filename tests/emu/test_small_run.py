"""bench/gpu/small_run.py, what compute-sanitizer watches on a GPU: it launches every kernel there is."""

import importlib.util

from emu import backend, build, plugin


def launches(module) -> dict[str, int]:
    return dict(module.emu_launches())


def test_the_small_run_launches_every_kernel(capsys):
    spec = importlib.util.spec_from_file_location("small_run", build.ROOT / "bench/gpu/small_run.py")
    small_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_run)
    module = plugin.executor()
    before = launches(module)
    with backend.emulated(module):
        small_run.main("cpu")
    launched = {name for name, count in launches(module).items() if count > before.get(name, 0)}
    assert plugin.kernels_of(launched) == plugin.kernels_of_the_sources()
