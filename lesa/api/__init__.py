"""The functions that users call first. The only folder that joins pipelines, calibrations, predictors and files."""
