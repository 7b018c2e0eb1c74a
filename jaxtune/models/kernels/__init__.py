"""Attention in several forms, and matrix products with plain and with quantized weights."""
