"""The kernels as functions. `torch.ops.pyfastpeft.<name>` is the flat form of each."""
