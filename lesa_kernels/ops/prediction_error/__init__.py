"""How far a combination of kept features is from the truth, in one pass and without writing the combination."""
