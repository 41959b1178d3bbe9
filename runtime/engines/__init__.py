"""What TensorRT engines need, to be built and to be run.

flavors.py    TensorRT or TensorRT for RTX: which is here, its log, our plugin in its registry
network.py    how a network of ours is parsed and configured for building
side_car.py   X.plan.json: what is written beside a plan, and the checks before it is loaded
cudart.py     the CUDA runtime through ctypes
"""
