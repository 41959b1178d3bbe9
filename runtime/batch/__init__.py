"""How do more pictures get filled than one machine can do?

batch_cli.py  misf-batch
entries.py    which pictures, with which masks, to which outputs: streamed, from folders, object stores and lists
worker.py     one picture at a time, in a process of the cluster
driver.py     hands entries to workers, and hands them out again when a worker dies
"""
