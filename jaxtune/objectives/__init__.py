"""What training minimizes: a registry, and one file for each objective."""
