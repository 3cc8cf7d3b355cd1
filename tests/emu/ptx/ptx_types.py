"""The PTX types in numpy, and the error for what the interpreter does not have."""

import numpy as np
from emu.ptx.text import Instruction, PtxError

DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # numpy has no such type: as its bits
    "pred": np.dtype(bool),
}


class Unknown(PtxError):
    """An instruction, or a form of one, that the interpreter does not have."""

    def __init__(self, instruction: Instruction):
        super().__init__(f"the PTX interpreter does not know the instruction {instruction}")
