"""What every layer uses: errors, files, dtypes, mesh and axis rules."""
