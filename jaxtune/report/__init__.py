"""The pages of runs and searches."""
