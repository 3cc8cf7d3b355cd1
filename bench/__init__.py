"""The benchmark suite behind `pyfastpeft bench`; README.md in this folder says how to read it."""
