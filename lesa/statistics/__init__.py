"""Inner products of features and of output errors: all that plans and coefficients are computed from."""
