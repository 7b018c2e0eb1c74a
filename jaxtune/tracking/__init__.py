"""The record of a run: its directory, its metrics, its trackers, its progress."""
