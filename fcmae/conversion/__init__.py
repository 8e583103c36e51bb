"""Trained networks for other libraries: written in their formats, loaded by them, compared."""
