"""LoRA, and putting it on a model."""
