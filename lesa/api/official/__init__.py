"""The checkpoints that the authors of LESA released: read without running them, and turned into our own."""

from lesa.api.official.checkpoint import OfficialCheckpoint, load_official, read_official

__all__ = ["OfficialCheckpoint", "load_official", "read_official"]
