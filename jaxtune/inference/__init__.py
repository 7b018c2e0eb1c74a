"""Sampling and the prefill/decode engine."""
