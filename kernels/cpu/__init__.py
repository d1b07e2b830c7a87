"""C++ building blocks of the CPU kernels."""
