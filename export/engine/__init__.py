"""From an ONNX file to a TensorRT engine.

builder.py    builds and checks an engine, writes plan and side-car
options.py    the options that misf-build and misf-export share
monitor.py    progress, and Ctrl-C during a build
build_cli.py  misf-build
"""
