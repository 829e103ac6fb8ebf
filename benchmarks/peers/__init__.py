"""Layers of other libraries, written from their formulas, for comparisons in one process."""
