"""Machine code for CPUs, made at run time by llvmlite and called by XLA through its FFI: what such kernels share."""
