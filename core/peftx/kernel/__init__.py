"""Plugins on one model: what a plugin is, where it can act, what it did, and how that goes away again.

Nothing here knows of data, training, generation or files.
"""
