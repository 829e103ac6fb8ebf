"""What all other folders speak: plans, times, coefficient tables, and the contracts of forecasters and memories."""
