"""Forms of attention, and products of matrices, quantized ones among them."""
