"""A row of the Gram matrix of features: inner products of one feature with all kept ones."""
