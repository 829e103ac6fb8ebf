"""How results are shown, and the machine that they were measured on."""
