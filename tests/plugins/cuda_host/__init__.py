"""The CUDA kernels executed on a CPU: their very source, compiled as C++ and walked thread by thread."""
