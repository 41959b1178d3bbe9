"""How does NVIDIA Triton run a model? `misf-export --triton` writes the repository; this runs inside the server.

network_model.py  float32 tensors in and out, through any backend of misf: for servers without one for the file
picture_model.py  encoded pictures in and out; asks the network model of the same server
"""
