"""Changes to images: their names, nothing more."""

import enum


class InterpolationMode(enum.Enum):
    """Ways to resize."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


from . import functional, v2  # noqa: E402  (both take the class above)

__all__ = ["InterpolationMode", "functional", "v2"]
