"""What is measured while a model samples normally, and what is learned from it."""
