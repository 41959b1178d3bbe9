"""The dynamic filter as a TensorRT plugin: its C++ sources, and library.py, which builds, finds and loads it."""
