"""The compiled module, loaded after torch so that both share one OpenMP runtime.

`_C` is compiled with -fopenmp but linked against no OpenMP library: its symbols resolve to the libgomp that
`import torch` has put into the process, and `torch.set_num_threads` then governs our loops too.
"""

import torch  # noqa: F401  (first: it loads the OpenMP runtime)

from pyfastpeft import _C

__all__ = ["_C"]
