"""What a row holds: one module a format, and the registry that tells them apart."""
