"""Ways into other people's code: each folder serves one library. Only these (and the demo) import diffusers."""
