"""Changes to images as functions: all raise."""

from typing import Any, NoReturn

from . import InterpolationMode


def pil_to_tensor(*_: Any, **__: Any) -> NoReturn:
    """Raise: there are no images."""
    raise NotImplementedError(
        "this torchvision is cosched's stand-in for text; install torchvision"
    )


normalize = rescale = resize = to_pil_image = pil_to_tensor

__all__ = [
    "InterpolationMode",
    "normalize",
    "pil_to_tensor",
    "rescale",
    "resize",
    "to_pil_image",
]
