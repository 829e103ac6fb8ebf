"""Predictions by a KAN on the features themselves."""
