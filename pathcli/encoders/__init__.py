"""Images in, vectors and tokens out: encoders by name, and the loop that embeds slides."""

from pathcli.encoders.build import build_encoder

__all__ = ["build_encoder"]
