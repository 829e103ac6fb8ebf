"""The demo model: all methods on all plans, its denoising loop compared with other caches, and its training."""
