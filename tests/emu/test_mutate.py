"""The mutation check itself: what it takes out, and that a mutant nobody notices is told from one that is caught."""

import pytest
from emu import build, mutate

TEXT = """
template <typename T>
__global__ void __launch_bounds__(kThreads, kTiles <= 2 ? 2 : 1)
    some_kernel(const T* x, int n, T* y) {
  const bool inside = first + 4 <= n && aligned;  // a < b in a comment
  for (int i = 0; i < n; ++i) y[i] = x[i];
  if (threadIdx.x < n) {
    __syncthreads();
    kp::cp_async_wait<0>();
  }
  y[0] = n > 3 ? x[f(a, b < c)] : T(0);
  const bool whole = std::int64_t(x) >= std::int64_t(n) ? true : false;
  if constexpr (kSize < 4) __syncwarp();
  __syncthreads();
}
void launcher(int n) {
  if (n < 3) return;
}
"""


def test_what_is_taken_out():
    names = [m.name for m in mutate.mutants("csrc/a/a_cuda.cu", TEXT)]
    assert names == [
        "csrc/a/a_cuda.cu:const bool inside = ⟦first + 4 <= n⟧ && aligned;",
        "csrc/a/a_cuda.cu:if (⟦threadIdx.x < n⟧) {",
        "csrc/a/a_cuda.cu:⟦__syncthreads();⟧",
        "csrc/a/a_cuda.cu:⟦kp::cp_async_wait<0>();⟧",
        "csrc/a/a_cuda.cu:y[0] = ⟦n > 3⟧ ? x[f(a, b < c)] : T(0);",
        "csrc/a/a_cuda.cu:y[0] = n > 3 ? x[f(a, ⟦b < c⟧)] : T(0);",
        "csrc/a/a_cuda.cu:const bool whole = ⟦std::int64_t(x) >= std::int64_t(n)⟧ ? true : false;",
        "csrc/a/a_cuda.cu:if constexpr (kSize < 4) ⟦__syncwarp();⟧",
        "csrc/a/a_cuda.cu:⟦__syncthreads();⟧ (number 2)",
    ]


def test_every_kernel_file_has_tests_and_mutants():
    files = mutate.kernel_files([])
    assert "csrc/nf4/nf4_quantize_cuda.cu" in files
    for file in files:
        for test in mutate.tests_of(file):
            assert "device" in (mutate.ROOT / test).read_text(encoding="utf-8"), f"{test} has no emulated tests"
    assert sum(len(mutate.mutants(f, (mutate.ROOT / f).read_text(encoding="utf-8"))) for f in files) > 100


def test_the_list_of_equivalent_mutants_names_mutants_that_exist():
    existing = {
        m.name
        for f in mutate.kernel_files([])
        for m in mutate.mutants(f, (mutate.ROOT / f).read_text(encoding="utf-8"))
    }
    for name in mutate.listed():
        assert name in existing, f"{name} of equivalent_mutants.txt is in no kernel; `make mutate` says what survives"


def test_a_mutant_that_is_caught_and_one_that_does_not_compile():
    try:
        build.load()
    except build.Unavailable as missing:
        pytest.skip(str(missing))
    path = "csrc/nf4/nf4_quantize_cuda.cu"
    found = mutate.mutants(path, (mutate.ROOT / path).read_text(encoding="utf-8"))
    guard = next(m for m in found if "packed[" in m.name and "⟦" in m.name)
    module = mutate.build_mutant(guard, "test")
    green, output = mutate.run_tests(mutate.tests_of(path), module)
    assert not green and "OUT OF BOUNDS" in output, output
    with pytest.raises(RuntimeError, match="does not compile"):
        mutate.build_mutant(guard._replace(replacement="no_such_name"), "test")


def test_the_report(capsys):
    reasons = {"csrc/a/a_cuda.cu:known": "why", "csrc/a/a_cuda.cu:stale": "why", "csrc/b/b_cuda.cu:other": "why"}
    outcomes = {
        "csrc/a/a_cuda.cu:known": "SURVIVED",
        "csrc/a/a_cuda.cu:new": "SURVIVED",
        "csrc/a/a_cuda.cu:x": "caught",
    }
    assert mutate.report(outcomes, reasons, ["csrc/a/a_cuda.cu"], None, 60.0) == 1
    text = capsys.readouterr().out
    assert "1 survived and stand not in equivalent_mutants.txt:\n  csrc/a/a_cuda.cu:new" in text
    assert (
        "1 stand in equivalent_mutants.txt and survive no longer (delete the lines):\n  csrc/a/a_cuda.cu:stale" in text
    )
    del outcomes["csrc/a/a_cuda.cu:new"], reasons["csrc/a/a_cuda.cu:stale"]
    assert mutate.report(outcomes, reasons, ["csrc/a/a_cuda.cu"], None, 60.0) == 0
