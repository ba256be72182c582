"""Reading of images: not here."""

import enum
from typing import Any, NoReturn


class ImageReadMode(enum.Enum):
    """Channels of a decoded image."""

    UNCHANGED = 0
    GRAY = 1
    GRAY_ALPHA = 2
    RGB = 3
    RGB_ALPHA = 4


def decode_jpeg(*_: Any, **__: Any) -> NoReturn:
    """Raise: there are no images."""
    raise NotImplementedError(
        "this torchvision is cosched's stand-in for text; install torchvision"
    )


decode_image = read_image = decode_jpeg
