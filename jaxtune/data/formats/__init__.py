"""What a row holds."""
