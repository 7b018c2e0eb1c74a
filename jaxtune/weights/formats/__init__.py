"""Formats of weights: one module or folder each, named as `--to` names the format, with its
`FORMAT`.
"""
