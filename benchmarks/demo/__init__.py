"""The demo model: all methods on all plans, its denoising loop beside other caches, and its training."""
