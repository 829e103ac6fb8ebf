"""All rows, and the classes that have none."""

from tests.lesa.adapters.models.audio import AUDIO
from tests.lesa.adapters.models.images import IMAGES
from tests.lesa.adapters.models.row import Row
from tests.lesa.adapters.models.videos import VIDEOS

ROWS: dict[str, Row] = {**IMAGES, **VIDEOS, **AUDIO}
