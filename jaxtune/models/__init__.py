"""The decoder, one file an idea."""
