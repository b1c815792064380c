"""Pixels in, tiles out: open a slide, find its tissue, cut it, draw what was cut."""

from pathcli.slides.discovery import discover
from pathcli.slides.readers import open_slide

__all__ = ["discover", "open_slide"]
