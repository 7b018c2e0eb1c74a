"""Whether a run fits hardware that is not there, and what it costs: the very step that trains,
compiled for it.
"""
