"""The demo: a small FLUX, trained on handwritten digits, calibrated, accelerated and compared. ``lesa demo``."""
