"""Code that all parts of misf share: the dynamic filter, and shared/ with errors, files and commands."""
