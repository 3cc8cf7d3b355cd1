"""torchao's NF4, which has moved between its releases."""

import importlib
import importlib.util

# 0.18's place, and the one of releases before it
PLACES = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")


def torchao_nf4(suite):
    """The module with to_nf4 and linear_nf4, or None where torchao is not installed or no longer has one."""
    if suite.peer("torchao") is None:
        return None
    for place in PLACES:
        try:
            if importlib.util.find_spec(place) is not None:
                return importlib.import_module(place)
        except ModuleNotFoundError:  # a folder above it is missing
            continue
    print(f"this torchao has no NF4 in {' or '.join(PLACES)}: its columns are missing")
    return None
