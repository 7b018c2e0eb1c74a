"""The typed description of a run."""
