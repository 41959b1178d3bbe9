"""Code that every part of misf may import; nothing here imports other parts of misf.

errors.py    the error classes and their exit codes
files.py     atomic writing of files
extras.py    whether a package is installed, and the error that names the extra to install
command.py   features of all commands: options, logging, one line for a known failure
progress.py  a progress bar on a terminal, one line per minute elsewhere
shipped.py   the networks that come with misf, by name
"""
