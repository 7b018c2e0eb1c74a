"""The foundation of every layer: errors, files, dtypes, devices, mesh and sharding rules."""
