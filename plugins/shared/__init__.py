"""What every part of misf may import; nothing here imports anything else of misf.

errors.py    the error classes and their exit codes
files.py     files that are written whole or not at all
extras.py    whether a package is installed, and the error that names the extra that brings it
command.py   what all commands share: options, logging, one line for a known failure
progress.py  a bar on a terminal, a line a minute elsewhere
"""
