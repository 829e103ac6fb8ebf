"""Writes the measured parts of the documents and the pictures from the results in ``benchmarks/results``.

All modules of this package are imported, and register parts and pictures as ``registry.py`` describes.
"""
