"""Is it right?

accuracy.py       a model against the PyTorch reference on photographs
layer_errors.py   which layer differs
verify_cli.py     misf-verify
doctor.py         misf-doctor: this machine, and the filter on every backend
engine_checks.py  the filter on TensorRT, for misf-doctor
"""
