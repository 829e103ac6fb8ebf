"""The error of a combination of kept features, in one pass and without writing the combination."""
