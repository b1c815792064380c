"""Fixtures: an isolated cache, a store, a synthetic slide, the shared data, the fake encoder."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import synthetic
from hypothesis import settings

from pathcli import registry, slides
from pathcli.cli import main
from pathcli.store import Store
from pathcli.types import Slide
from pathcli.weights import find

ASIDE = "PATHCLI_TESTS_ASIDE"
"""Where all goes that is not below `tmp_path`; processes that are started here know it by this."""

if ASIDE not in os.environ:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # what failed is kept
    os.environ[ASIDE] = tempfile.mkdtemp(prefix="pathcli-")
    Path(os.environ[ASIDE]).chmod(0o711)  # a test is another user
    atexit.register(shutil.rmtree, os.environ[ASIDE], ignore_errors=True)
tempfile.tempdir = os.environ["TMPDIR"] = os.environ[ASIDE]

os.environ["HF_HUB_OFFLINE"] = "1"  # both are read once, when the hub's client is imported
os.environ["HF_HOME"] = str(Path(os.environ[ASIDE], "no-hub"))

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

DATA = Path(os.environ.get("PATHCLI_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SIZE = (1500, 1100)
TISSUE_BOX = (256, 192, 640, 512)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage neither while all is imported nor, later, among what was imported."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist keep the order below; by itself it deals the files of fewest tests last."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of most slow tests, so that all processes of a run end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


_opened: list[Slide] = []


def open_slide(path: Path | str, reader: str = "auto") -> Slide:
    """Open a slide that is closed when the test is over."""
    _opened.append(slides.open_slide(path, reader))
    return _opened[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHCLI_STORE", str(tmp_path / "default-store"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def _painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = synthetic.picture(*SIZE, TISSUE_BOX)
    return synthetic.slide(tmp_path_factory.mktemp("slides") / "painted.svs", pixels)


@pytest.fixture
def slide_path(_painted: Path, tmp_path: Path) -> Path:
    """A slide of 1500 x 1100 px at 0.5 mpp with tissue exactly in TISSUE_BOX."""
    return Path(shutil.copy(_painted, tmp_path / "painted.svs"))


@pytest.fixture
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no shared data at {DATA} (set PATHCLI_TEST_DATA)")
    return DATA


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type:
    import fakes

    monkeypatch.setitem(registry.BUILTIN["encoder"], "fake", "fakes:MeanColour")
    monkeypatch.setattr(fakes.MeanColour, "passes", 0)
    return fakes.MeanColour


@pytest.fixture
def lite0() -> None:
    if find("lite0") is None:
        pytest.skip("lite0 is not in the cache; run: pathcli models pull lite0")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command line in this process: exit code, stdout, stderr."""
    root = logging.getLogger()
    before = root.handlers[:]

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    yield call
    root.handlers[:] = before
