"""The families of models, as data."""
