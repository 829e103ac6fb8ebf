"""What happens during a generation, for any transformer: which steps run, what is kept, what is predicted."""
