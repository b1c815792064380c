"""Imported features are trained on, and the commands go there and back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from peer_files import D, register, trident

from pathcli.encoders.imported import Imported
from pathcli.errors import ResourceError, UsageError
from pathcli.store import Store


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def test_mil_trains_on_what_was_imported(store: Store, tmp_path: Path, run: Run) -> None:
    rows, rng = ["case_id,slide_id,label"], np.random.default_rng(0)
    for i in range(24):
        values = rng.normal(size=(4, D)).astype(np.float32)
        values[0, 0] += 8 * (i % 2)
        trident(tmp_path / "job", f"s{i}", values)
        rows.append(f"p{i},s{i},{'tumor' if i % 2 else 'normal'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    where = ("--store", store.root)
    code, out, _ = run("store", "import", tmp_path / "job", "--format", "trident", *where, "--json")
    (command,) = json.loads(out)["train"]
    assert code == 0
    words = shlex.split(command.replace("data.labels=labels.csv", "train.lr=0.003"))[1:]
    quick = ["train.epochs=8", "head.hidden=16", "train.seed=[1]"]
    more = [f"data.labels={tmp_path / 'labels.csv'}", *quick]
    sets = [text for setting in more for text in ("--set", setting)]
    code, out, err = run(*words, *sets, "--out", tmp_path / "runs", *where, "--device", "cpu")
    assert code == 0, err
    labels = tmp_path / "labels.csv"
    code, out, err = run("mil-eval", labels, "--runs", tmp_path / "runs", *where, "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]


def test_an_imported_encoder_embeds_nothing() -> None:
    encoder = Imported(id="uni_v1-imported")
    with pytest.raises(ResourceError, match="known by imported features alone"):
        encoder.load("cpu")
    with pytest.raises(UsageError, match="those end in -imported"):
        Imported(id="uni_v1")


def test_the_commands_go_there_and_back(
    store: Store, slide_path: Path, fake: type, tmp_path: Path, run: Run
) -> None:
    code, out, err = run(
        "embed", slide_path, "--encoder", "fake", "--store", store.root, "--json", "--device", "cpu"
    )
    assert code == 0, err
    folder = tmp_path / "job"
    told = ("store", "export", folder, "--format", "trident", "--store", store.root)
    code, out, err = run(*told, "painted")
    assert code == 0, err
    assert "painted" in out
    code, out, err = run(*told, "--json")
    assert not json.loads(out)["slides"][0]["written"]
    code, _, err = run(*told, "--labels", folder)
    assert (code, "--labels belongs to --format acmil" in err) == (2, True)
    other = tmp_path / "other"
    code, out, err = run(
        "store",
        "import",
        folder,
        "--format",
        "trident",
        "--slides",
        tmp_path,
        "--store",
        other,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["train"] == []
    assert set(Store(other).features) == set(store.features)
