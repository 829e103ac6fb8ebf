"""Ways into other people's code. Only the modules below here (and the demo) import diffusers."""
