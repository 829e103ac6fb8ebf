"""Files that the library writes and reads: whole or not at all, of a known kind and version, checked before use."""

from lesa.files.atomic import locked, replaced, write_text
from lesa.files.tensors import TensorFile, check_tensor, read_tensors, write_tensors

__all__ = ["TensorFile", "check_tensor", "locked", "read_tensors", "replaced", "write_tensors", "write_text"]
