"""The operations, each in a folder: what it is, how fast it runs on each device, and how PyTorch sees it."""
