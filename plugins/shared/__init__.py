"""What every part of misf may import; nothing here imports anything of misf.

errors.py    the error classes and their exit codes
files.py     files that are written whole or not at all
command.py   what all commands share: options, logging, one line for a known failure
"""
