"""The rows of all transformer classes of diffusers."""

from tests.lesa.adapters.diffusers.models.audio import AUDIO
from tests.lesa.adapters.diffusers.models.images import IMAGES
from tests.lesa.adapters.diffusers.models.row import Row
from tests.lesa.adapters.diffusers.models.videos import VIDEOS

ROWS: dict[str, Row] = {**IMAGES, **VIDEOS, **AUDIO}
