"""The maths in plain torch: the specification of the kernels and the oracle of their tests."""
