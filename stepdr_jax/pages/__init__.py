"""HTML pages that open offline: their templates, styles and plots."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
