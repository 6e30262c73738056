"""Reports that are one HTML file: templates and pictures inside it, nothing from the network."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

JPEG_QUALITY = 70


def render(package: str, template: str, values: dict[str, Any]) -> str:
    """A page from the template of a package (`templates/` beside its modules); all that is put into it is escaped.

    Raises:
        ValueError: jinja2 is not installed.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ValueError("the report needs jinja2: pip install -r requirements-data.txt") from None
    shared = ChoiceLoader([PackageLoader(package), PackageLoader("stableavatar")])
    environment = Environment(loader=shared, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(values)


def jpeg_uri(pixels: np.ndarray) -> str:
    """uint8 [height, width, 3] as the data URI of a small JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """A file's content as a link that holds it; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
