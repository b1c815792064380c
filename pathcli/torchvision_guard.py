"""Let `import torchvision` work beside a CPU-only torch; nothing in, nothing out.

The package index offers torchvision built for CUDA. Its compiled extension cannot load
under a CPU-only torch, and its Python side then fails on two operators nobody defined.
Declaring their schemas is enough for everything here (no detection model is used).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_keep: list[Any] = []  # the torch Library must outlive the import


def guard_torchvision() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` if the extension cannot load.

    Call it before the first import of torchvision, open_clip, timm or a vision model of
    transformers. Calling it again does nothing.
    """
    if _keep or _extension_loads():
        return
    import torch  # noqa: PLC0415

    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep.append(library)


def _extension_loads() -> bool:
    """Tell whether torchvision is absent or its compiled part fits this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    import torch  # noqa: PLC0415

    folder = Path(next(iter(spec.submodule_search_locations)))
    extensions = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    try:
        for path in extensions:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return bool(extensions)
