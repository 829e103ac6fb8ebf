"""The measured parts of the documents and the pictures, made from the results in ``benchmarks/results``.

Each module of this package that registers a part or a picture is found by itself; ``registry.py`` says how.
"""
