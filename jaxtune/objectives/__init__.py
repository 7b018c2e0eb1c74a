"""What is minimized, one file a method."""
