"""What all parts of misf share: the dynamic filter and the error classes."""
