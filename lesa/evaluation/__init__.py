"""What a forecaster and a plan are worth on a pipeline: quality and speed against the full sampler."""
