"""Adapters: the methods, one a file, and putting one on a model."""
