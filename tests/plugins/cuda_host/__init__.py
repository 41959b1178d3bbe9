"""Executes the CUDA kernels on a CPU: their source is compiled as C++ and run thread by thread."""
