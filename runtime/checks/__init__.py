"""Does it compute correctly?

accuracy.py       compares a model with the PyTorch reference on photographs
layer_errors.py   finds the layer that differs
verify_cli.py     misf-verify
doctor.py         misf-doctor: this machine, and the filter on every backend
engine_checks.py  the filter on TensorRT, for misf-doctor
"""
