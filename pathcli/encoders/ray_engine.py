"""A cluster in, the features of a list of slides in the store out: Ray does the rest.

Ray places the workers, restarts those that die, and gives them their slide again; here is only
which slide goes to which. A worker is an `Embedder` with its weights, on one GPU or on as many
cores as the network computes with.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from contextlib import ExitStack, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

import pathcli
from pathcli.device import share_cores
from pathcli.encoders.fleet import LOOK_S, Crew, Known, LostError
from pathcli.errors import ResourceError, UsageError
from pathcli.slides.readers import public_name
from pathcli.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.encoders.embedding import Embedder, EmbedRun
    from pathcli.types import Encoder

log = logging.getLogger("pathcli")

RETRIES = 3
"""How often Ray gives a slide to a new worker whose worker died."""

_ANSWER_S = 5.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
_QUIET |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def _import_ray() -> Any:  # noqa: ANN401 - a module
    """Return Ray, told to keep quiet.

    Raises:
        ResourceError: it is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: PLC0415
    except ImportError as error:
        msg = f"--engine ray needs a package ({error}); run: pip install 'pathcli[ray]'"
        raise ResourceError(msg) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _connect(ray: Any, address: str | None) -> None:  # noqa: ANN401 - a module
    """Connect to the cluster at `address`, or start one on this machine alone.

    Raises:
        ResourceError: no cluster answers there.
    """
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:  # what is passed around is small
        how |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        _answers(address)
        ray.init(address=address or "local", configure_logging=False, **how)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"--address {address}: no Ray cluster answers" if address else "Ray cannot start"
        msg = f"{where} ({line[:160]}); see: ray start --head, ray status"
        raise ResourceError(msg) from error


def _leave(ray: Any) -> None:  # noqa: ANN401 - a module
    """End what `_connect` began; troubles that Ray kept back are not for stdout either."""
    with redirect_stdout(io.StringIO()):
        ray.shutdown()


def _answers(address: str | None) -> None:
    """Refuse an address where nothing listens, for which Ray waits many minutes.

    Raises:
        OSError: nothing does.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()


class _Quiet(io.TextIOBase):
    """Stdout without what Ray's own threads print of its troubles: that is for who debugs."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, text: str, /) -> int:
        if not threading.current_thread().name.startswith("ray_"):
            return self.out.write(text)
        if text.strip():
            log.debug("%s", text.strip())
        return len(text)

    def flush(self) -> None:
        self.out.flush()


class _Board:
    """How far each slide is, as the workers tell."""

    def __init__(self) -> None:
        self.at: dict[str, tuple[int, int]] = {}

    def tell(self, slide: str, done: int, of: int) -> None:
        self.at[slide] = (done, of)

    def read(self) -> dict[str, tuple[int, int]]:
        return self.at


class _Worker:
    """An `Embedder` wherever Ray has put it; begun by `begin`, and anew when Ray restarts it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.embedder: Embedder | None = None

    def begin(self) -> str:
        """Load what embeds; return this node's name."""
        given, node = self.given, socket.gethostname()
        if given["version"] != pathcli.__version__:
            msg = (
                f"{node} has pathcli {pathcli.__version__}, here is {given['version']}; install "
                "the same on every node"
            )
            raise ResourceError(msg)
        logging.getLogger("pathcli").setLevel(given["level"])
        with suppress(OSError):  # so that names are those of the driver
            os.chdir(given["folder"])
        share_cores()  # before torch is imported
        import torch  # noqa: PLC0415

        from pathcli.encoders.embedding import Embedder  # noqa: PLC0415

        if given["threads"]:  # not Ray's: their number can change the last digits
            torch.set_num_threads(given["threads"])
        store = Store(given["store"], create=False)  # a node that cannot see it makes none
        encoder = pickle.loads(given["encoder"])  # noqa: S301 - the driver's own
        self.embedder = Embedder(encoder, store, **given["how"])
        return node

    def embed(self, job: Known, after: Known | None) -> EmbedRun:
        """Embed one slide here while the one after it is prepared."""
        if self.embedder is None:
            self.begin()
        import ray  # noqa: PLC0415

        # by name: an actor that is to be restarted may hold no reference from its beginning
        board, embedder = ray.get_actor(self.given["board"]), cast("Embedder", self.embedder)
        embedder.expect([job, after] if after else [job])
        return embedder(job[0], progress=lambda *at: board.tell.remote(job[0], *at), **job[1])


class _Hand:
    """A worker, as a thread of the driver sees it."""

    def __init__(self, ray: Any, actor: Any) -> None:  # noqa: ANN401 - Ray's own
        self.ray, self.actor = ray, actor

    def ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - what it returns
        """Return what the worker answers.

        Raises:
            LostError: the worker died, and so did those in its place.
        """
        errors = self.ray.exceptions
        try:
            return self.ray.get(getattr(self.actor, method).remote(*arguments))
        except errors.RayTaskError as error:
            raise _told(error) from error
        except errors.RayActorError as error:
            raise _told(error) from error

    def embed(self, job: Known, after: Known | None) -> EmbedRun:
        """See `Hand.embed`."""
        try:
            run: EmbedRun = self.ask("embed", job, after)
        except LostError as error:
            slide = public_name(job[0])
            msg = f"{slide}: {RETRIES + 1} workers died with it, for want of memory perhaps"
            raise LostError(msg) from error
        return run

    def close(self) -> None:
        """See `Hand.close`."""
        with suppress(Exception):  # Ray is gone already
            self.ray.kill(self.actor)


def _told(error: Any) -> Exception:  # noqa: ANN401 - one of Ray's
    """Return what an error of a worker means here."""
    text = str(error)
    if "No module named 'pathcli" in text:
        msg = "a node of the cluster has no pathcli; install the same on every node"
        return ResourceError(msg)
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception) and not type(cause).__module__.startswith("ray."):
        return cause
    return LostError((text.strip().splitlines() or ["a worker died"])[0])


class RayCrew(Crew):
    """An `Embedder` on each GPU, or each few cores, of a Ray cluster; more when nodes join."""

    def __init__(
        self,
        encoder: Encoder,
        store: Store | None = None,
        *,
        device: str = "auto",
        address: str | None = None,
        workers: int = 2,
        **how: Any,  # noqa: ANN401 - what `Embedder` takes
    ) -> None:
        """Connect to a cluster.

        Args:
            encoder: what embeds.
            store: where features are kept, under an address that every node knows.
            device: cpu, cuda, or auto: cuda if the cluster has a GPU.
            address: the cluster's, or auto for the one this machine belongs to; None starts Ray
                on this machine until `close`.
            workers: threads that read, for each worker.
            how: what else `Embedder` takes.

        Raises:
            UsageError: another device.
            ResourceError: no Ray, no cluster, or no GPU on this machine.
        """
        super().__init__(encoder, store)
        if device not in {"auto", "cpu", "cuda"}:
            msg = f"--engine ray finds the devices itself: --device auto, cpu or cuda, not {device}"
            raise UsageError(msg)
        self._ray, self._exit = _import_ray(), ExitStack()
        self._exit.enter_context(redirect_stdout(_Quiet(sys.stdout)))
        try:
            if not self._ray.is_initialized():
                self._exit.callback(_leave, self._ray)
                _connect(self._ray, address)
            self._needs = self._place(device, workers, joining=address is not None)
            how |= {"workers": workers, "device": self._device}
            self._given = self._told_to_all(how)
            board = self._ray.remote(_Board)
            self._board = board.options(
                num_cpus=0, max_restarts=-1, name=self._given["board"]
            ).remote()
        except BaseException:
            self._exit.close()
            raise
        self._pending, self._seen, self._looked = 0, dict[str, tuple[int, int]](), 0.0

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _place(self, device: str, workers: int, *, joining: bool) -> dict[str, float]:
        """Return what a worker needs of its node; on CPUs as many as the network computes with."""
        nodes = self._nodes()
        gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
        self._device = device if device != "auto" else "cuda" if gpus else "cpu"
        self._threads_each = 0
        if self._device == "cpu":
            import torch  # noqa: PLC0415

            self._threads_each = torch.get_num_threads()
        elif not gpus and not joining:
            msg = "--device cuda: no GPU is here"
            raise ResourceError(msg)
        elif not gpus:
            log.warning("no node of the cluster has a GPU; waiting for one")
        most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
        cpus = min(max(workers, self._threads_each), max(1, most))
        return {"num_cpus": cpus, "num_gpus": 1 if self._device == "cuda" else 0}

    def _told_to_all(self, how: dict[str, Any]) -> dict[str, Any]:
        """Return what every worker is told."""
        return {
            "version": pathcli.__version__,
            "level": logging.getLogger("pathcli").level,
            "folder": os.getcwd(),  # noqa: PTH109 - as it is
            "threads": self._threads_each,
            "encoder": pickle.dumps(self.encoder),  # unpickled when the cores are shared out
            "store": self.store.root,
            "how": how,
            "board": f"board-{uuid.uuid4()}",
        }

    def _places(self) -> Sequence[str]:
        """Name the workers there is room for, and one that waits for room."""
        needs = {"CPU": self._needs["num_cpus"], "GPU": self._needs["num_gpus"]}
        room = sum(
            min(int(node.get(kind, 0) // need) for kind, need in needs.items() if need)
            for node in self._nodes()
        )
        return [f"worker {i}" for i in range(room + 1)]

    def _hire(self, place: str) -> _Hand:
        """Ask Ray for a worker, and wait until it has its place; then another may wait for one."""
        remote = self._ray.remote(_Worker).options(
            **self._needs,
            max_restarts=-1,
            max_task_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )
        with self._lock:
            self._pending += 1
        hand = _Hand(self._ray, remote.remote(self._given))
        self._hands.add(hand)
        try:
            log.debug("%s is on %s", place, hand.ask("begin"))
        except BaseException:
            hand.close()
            raise
        finally:
            with self._lock:
                self._pending -= 1
        with self._lock:
            more = not self._pending and len(self._turns) and not self._closed.is_set()
            self._working += bool(more)
        if more:
            self._start(f"worker {len(self._threads)}")
        return hand

    def _look(self) -> Mapping[str, tuple[int, int]]:
        if time.monotonic() - self._looked > LOOK_S:
            with suppress(self._ray.exceptions.RayError):
                self._seen = self._ray.get(self._board.read.remote(), timeout=LOOK_S)
            self._looked = time.monotonic()
        return self._seen

    def close(self) -> None:
        """End the workers; a Ray that was started here ends too."""
        try:
            super().close()
        finally:
            self._exit.close()
