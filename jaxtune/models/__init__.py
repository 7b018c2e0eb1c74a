"""The decoder, from its layers to the families of models it computes."""
