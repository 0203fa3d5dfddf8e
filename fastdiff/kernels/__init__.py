"""The Triton kernels: one file an operation. Imported when they first run."""
