"""Predictions as linear combinations of kept features."""
