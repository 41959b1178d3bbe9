"""Shared code for building and running TensorRT engines.

flavors.py    TensorRT or TensorRT for RTX: which is installed, its log, our plugin in its registry
network.py    parsing and configuring a network for building
side_car.py   X.plan.json, the file beside a plan, and the checks before the plan is loaded
inspector.py  types, layers and formats of a finished engine
rtx.py        running engines of TensorRT for RTX
cudart.py     the CUDA runtime through ctypes
"""
