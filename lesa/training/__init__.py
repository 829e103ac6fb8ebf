"""Fitting a LESA predictor: from the features of whole generations, or from the statistics of a calibration."""
