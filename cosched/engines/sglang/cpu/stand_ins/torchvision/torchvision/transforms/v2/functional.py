"""The same functions as in the first interface."""

from torchvision.transforms.functional import (
    InterpolationMode,
    normalize,
    pil_to_tensor,
    rescale,
    resize,
    to_pil_image,
)

__all__ = [
    "InterpolationMode",
    "normalize",
    "pil_to_tensor",
    "rescale",
    "resize",
    "to_pil_image",
]
