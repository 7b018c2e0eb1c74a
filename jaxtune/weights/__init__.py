"""Reading and writing weights and adapters, strictly."""
