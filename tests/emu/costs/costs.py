"""What one operation of one thread costs on the host executor: the figures of tests/emu/README.md.

PYTHONPATH=.:tests python -m emu.costs.costs
"""

import statistics
import time
from pathlib import Path

import torch
from emu import build

HERE = Path(__file__).resolve().parent
# in the order of costs.cu; how many threads share one of it
OPERATIONS = {"nothing": 1, "global read": 1, "shared write": 1, "barrier": 1, "shuffle": 1, "mma": 32}
THREADS, ROUNDS, RUNS = 256, 400, 9


def main() -> None:
    module = build.load_module(build.build("_C_costs", [HERE / "costs.cu"], [HERE / "costs_bind.cpp"]))
    x, y = torch.zeros(THREADS), torch.zeros(THREADS)
    module.emu_configure(0, 0)
    nothing = 0.0
    for number, (name, sharing) in enumerate(OPERATIONS.items()):
        samples = []
        for _ in range(RUNS):
            begin = time.process_time()
            error = module.run(number, x.data_ptr(), y.data_ptr(), ROUNDS)
            samples.append((time.process_time() - begin) / (THREADS * ROUNDS))
            module.emu_forget_ranges()
            if error:
                raise RuntimeError(f"{name}: the launch failed with error {error}")
        seconds = statistics.median(samples)
        if name == "nothing":
            nothing = seconds
            print(f"a round of the loop: {seconds * 1e9:.1f} ns")
        else:
            print(f"{name}: {(seconds - nothing) * sharing * 1e9:.1f} ns")


if __name__ == "__main__":
    main()
