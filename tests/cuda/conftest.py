"""These tests run CUDA kernels: on a GPU if the extension was built for one, else in the emulator.

tests/test_cuda.py runs them so where there is no GPU.
"""
