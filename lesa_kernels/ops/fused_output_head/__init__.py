"""From kept features straight to a transformer's output: combination, layer norm, modulation and projection."""
