from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from pathcli import registry
from pathcli.errors import UsageError


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    registry._plugins.cache_clear()
    yield
    registry._plugins.cache_clear()


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, table in registry.BUILTIN.items() for n in table]
)
def test_every_built_in_name_imports(kind: str, name: str) -> None:
    assert callable(registry.resolve(kind, name))


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'pathgen-clip'"):
        registry.resolve("encoder", "pathgen-clop")


def test_a_plugin_adds_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "fakes:MeanColour", "pathcli.encoder")
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [point] if "encoder" in group else []
    )
    assert registry.resolve("encoder", "mine").__name__ == "MeanColour"
    assert "mine" in registry.names("encoder")
    assert "mine" not in registry.names("tissue")


def test_a_plugin_may_not_replace_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("lite0", "fakes:MeanColour", "pathcli.encoder")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(UsageError, match="may not replace"):
        registry.resolve("encoder", "lite0")
