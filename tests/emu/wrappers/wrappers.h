#pragma once

// Runs kernel number `wrapper` (WRAPPERS of ../test_wrappers.py) on one warp; returns the launch's cudaError_t.
extern "C" __attribute__((visibility("default"))) int run_wrapper(int wrapper, const void* in, void* out, void* stream);
