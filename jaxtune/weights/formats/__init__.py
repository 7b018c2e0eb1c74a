"""Formats of weights, one module or folder each."""
