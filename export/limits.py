"""Lengths that several parts of export keep to, in tokens."""

MIN_LENGTH = 32
"""What a model must take at least, for its engine to be verified."""
UNKNOWN_LENGTH = 2048
"""Positions of a model whose configuration names no limit (ALiBi models, mostly)."""
