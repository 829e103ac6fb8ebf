"""Calibration: statistics of a model's features, and the best plan and coefficients for every budget."""
