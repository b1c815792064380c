"""A device's name in, a usable torch device out."""

from __future__ import annotations

import os

from pathcli.errors import ResourceError


def pick_device(name: str) -> str:
    """Return a usable torch device: the named one, or with `auto` the best there is.

    Raises:
        ResourceError: the named device is not here.
    """
    import torch  # noqa: PLC0415

    here = {"cpu"}
    if torch.cuda.is_available():
        here |= {"cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    if torch.backends.mps.is_available():
        here.add("mps")
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if d in here)
    if name not in here:
        msg = f"--device {name} is not here; there is: auto, {', '.join(sorted(here))}"
        raise ResourceError(msg)
    return name


def share_cores() -> None:
    """Let OpenMP's threads sleep where they wait, so that readers get the cores meanwhile.

    Spinning threads took a sixth of the time of a small network's embedding. It is read when
    torch is loaded, so this comes before; a user's own OMP_WAIT_POLICY stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
