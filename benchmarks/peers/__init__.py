"""What others run, written from their formulas, for comparisons in one process."""
