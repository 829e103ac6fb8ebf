"""diffusers: attaches a driver to the transformers of a pipeline; what is known of its models and schedulers."""

from lesa.adapters.diffusers.attachment import Attachment, detach
from lesa.adapters.diffusers.taylorseer import from_taylorseer_config

__all__ = ["Attachment", "detach", "from_taylorseer_config"]
