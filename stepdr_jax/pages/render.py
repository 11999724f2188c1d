"""Renders a page from its template, with styles, scripts and data inside, so that one file opens offline.

Everything that a template prints is escaped. Data for scripts travels as JSON that cannot end its script element.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from stepdr_jax.pages.wording import percent

TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters |= dict(thousands=lambda n: f"{n:,}", percent=percent)


def render_page(
    template: str, context: Mapping[str, Any], *, styles: Sequence[str], scripts: Sequence[str] = ()
) -> str:
    """Returns a page. `styles` and `scripts` are files beside the template, given to it as `css` and `script`."""
    css, script = (
        markupsafe.Markup("".join((TEMPLATES / name).read_text() for name in names)) for names in (styles, scripts)
    )
    return _ENVIRONMENT.get_template(template).render({**context, "css": css, "script": script}).lstrip()


def embed_json(value: Any) -> str:
    """JSON that is safe inside <script type="application/json">: no character that could end the element."""
    text = _compact_json(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def pack_json(value: Any) -> str:
    """JSON, deflated, in base64: text for <script type="text/plain"> that the page's script unpacks when needed."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # without zlib's header: "deflate-raw" of browsers
    return base64.b64encode(deflate.compress(_compact_json(value).encode()) + deflate.flush()).decode()


def _compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
