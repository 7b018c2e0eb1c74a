"""State, optimizer, the pure step, the loop and its record."""
