"""Stands for the package of this name where text alone is served.

SGLang and transformers import it with their image processors, whatever the model. Names that they
import are here; whatever would touch an image raises.
"""

from . import io, transforms

__version__ = "0.28.0"

__all__ = ["io", "transforms"]
