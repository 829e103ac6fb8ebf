"""A model of small colour pictures, on which choices that suit the demo's digits are checked."""
