#pragma once

// Launches 256 threads that do one operation (costs.py: OPERATIONS) `rounds` times; returns the launch's cudaError_t.
int run_cost(int operation,
             const float* x,  // [256]
             float* y,        // [256]
             int rounds);
