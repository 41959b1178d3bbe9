"""What is the network, and how is it saved?

config.py       sizes and wiring, saved with every checkpoint
network.py      the generator
smooth_fill.py  the classical fill that misf-small's layers correct
checkpoint.py   files of weights: ours and the published ones
"""
