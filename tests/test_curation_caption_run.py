"""Slides in, files of captions out, by scripted agents; models of this machine; wrong captions."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from fakes import Colours
from test_curation_caption import LONG, WORDS, Long, Scripted, edit

from pathcli.curation.caption import agents
from pathcli.curation.caption.corrupt import corrupted
from pathcli.curation.caption.pipeline import Agents, Captioner, caption_slides
from pathcli.curation.caption.retriever import Retriever
from pathcli.curation.caption.revise import apply, read_edits
from pathcli.curation.caption.select import Choice
from pathcli.curation.caption.texts import Reports
from pathcli.curation.local import VisionModel
from pathcli.curation.models import UNFAMILIAR, Reply, Unfamiliar
from pathcli.data.formats import Source, samples
from pathcli.data.images import read_image
from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError, ResourceError
from pathcli.llm import Message, Picture
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.types import Region, Sample
from pathcli.vlm.responders import Decoding, Unfinished

# --- a model of this machine -------------------------------------------------------------


class Echo:
    """A responder that says how many images and which words it was asked about."""

    name, scope, digest, batch = "echo", "", "echo", 2
    decoding, temperature, taught = Decoding(), None, ()
    kind: type[str] = str

    def __init__(self) -> None:
        self.seen: list[Sample] = []
        self.strange: set[bytes] = set()

    def unfamiliar(self, images: Sequence[Any]) -> list[Any]:
        return [path for path in images if Path(path).read_bytes() in self.strange]

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        if any("too long" in sample.turns[-1] for sample in samples):
            msg = "chat.limit"
            raise DataError(msg)
        self.seen += samples
        assert decoding is not None
        made = (f"{len(s.images)} {s.turns[-1]} {decoding.max_new_tokens}" for s in samples)
        yield from map(self.kind, made)


def test_a_model_of_this_machine_is_asked_once_and_knows_what_it_does_not_know(
    tmp_path: Path,
) -> None:
    known, strange = Picture(b"\x89PNG a"), Picture(b"\x89PNG b")
    echo = Echo()
    echo.strange = {strange.data}
    talk = [agents.user(known, "a"), Message("assistant", ("b",)), agents.user("c")]
    said = [[agents.user(known, "q")], [agents.user(strange, "q")], [agents.user("too long")], talk]

    def ask() -> list[Reply]:
        return list(VisionModel(echo, store=Store(tmp_path)).ask_all(iter(said), max_tokens=7))  # type: ignore[arg-type]

    first = ask()
    assert first == [
        Reply("1 <image>\nq 7"),
        Reply("", UNFAMILIAR),
        Reply("", "chat.limit"),
        Reply("1 c 7"),
    ]
    assert echo.seen[1].turns == ("<image>\na", "b", "c")
    assert ask() == first
    assert len(echo.seen) == 2


def test_what_a_model_does_not_know_is_answered_with_a_note_where_that_is_wanted(
    tmp_path: Path,
) -> None:
    strange, echo = Picture(b"\x89PNG b"), Echo()
    echo.strange = {strange.data}
    said, store = [[agents.user(strange, "q")]], Store(tmp_path)
    keeps = VisionModel(echo, store=store, unfamiliar="keep")  # type: ignore[arg-type]
    told = Reply("1 <image>\nq 7", note=UNFAMILIAR)
    for _ in range(2):
        assert list(keeps.ask_all(said, max_tokens=7)) == [told]
    assert len(echo.seen) == 1
    drops = VisionModel(echo, store=store)  # type: ignore[arg-type]
    assert list(drops.ask_all(said, max_tokens=7)) == [Reply("", UNFAMILIAR)]
    again = VisionModel(echo, store=store, unfamiliar="keep")  # type: ignore[arg-type]
    assert list(again.ask_all(said, max_tokens=7)) == [told]
    assert (len(echo.seen), again.budget.before.requests) == (1, 1)


def test_an_answer_that_the_limit_ended_is_cut_off() -> None:
    echo = Echo()
    echo.kind = Unfinished
    (reply,) = VisionModel(echo).ask_all([[agents.user("q")]], max_tokens=7)  # type: ignore[arg-type]
    assert reply == Reply("0 q 7", "cut off at 7 tokens")


# --- from slides to files ----------------------------------------------------------------


def pipeline(store: Store, team: Agents, prompt: Scripted, **given: Any) -> Captioner:
    spec = tile_spec(64, 0.5)
    choice = Choice(**{"top": 3, "diverse": 4, "duplicates": 1.0} | given.pop("choice", {}))
    retriever = Retriever(Embedder(Long(), store), choice=choice, prompt=prompt, spec=spec, **given)
    return Captioner(retriever, team)


def team(**given: Any) -> Agents:
    return Agents(describe=Scripted(by=lambda _: LONG), **given)


def attributes() -> Scripted:
    return Scripted('["red", "blue"]', by=None)


def test_slides_become_captions_that_are_read_again_from_the_same_pixels(
    store: Store, slide_path: Path, tmp_path: Path
) -> None:
    reviser = Scripted(by=lambda _: edit(op="delete", text="blue blue blue."))
    reports = Reports({slide_path.stem: "a red report"})
    prompt = Scripted('["red", "blue"]', '["green"]')
    made = pipeline(
        store, team(revise=reviser, summarise="first-sentences"), prompt, reports=reports
    )
    out = tmp_path / "out"
    done = caption_slides([(slide_path, None, "given")], made, out, command="pathcli data caption")
    records = json.loads((out / "captions.json").read_text())
    traces = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    assert done["captions"] == len(records) == len(traces) >= 4
    assert {*records[0]} == {"wsi_id", "position", "caption", "file_id", "side"}
    assert {record["caption"] for record in records} == {"red red red red."}
    assert [step["agent"] for step in traces[0]["steps"]] == ["describe", "revise", "summarise"]
    assert {route for one in traces for route in one["chosen"]["routes"]} == {
        "attributes",
        "report",
        "diversity",
    }
    assert made.retriever.slides[0].findings == ["green"]
    source = Source(out / "captions.json", slide_path.parent)
    regions = [sample.images[0] for sample in samples(source)]
    assert [r.xy for r in regions if isinstance(r, Region)] == [
        tuple(map(int, r["position"])) for r in records
    ]
    assert read_image(regions[0]).shape == (64, 64, 3)
    page = (out / "report.html").read_text()
    assert all(text in page for text in ("Where they lie", LONG, "Research use only", "scripted"))
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["agents"] == {
        "describe": "scripted",
        "revise": "scripted",
        "summarise": "first-sentences",
    }
    assert facts["attributes"] == ["red", "blue"]
    assert facts["command"] == "pathcli data caption"
    assert facts["model digests"] == {"prompt": "0f", "describe": "0f", "revise": "0f"}
    assert facts["slides"] == [str(slide_path)]


def test_the_same_seed_writes_the_same_bytes(
    store: Store, slide_path: Path, tmp_path: Path
) -> None:
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made = pipeline(store, team(), attributes(), choice={"seed": seed, "diverse": 6})
        caption_slides([(slide_path, None, "given")], made, tmp_path / name)
        written.append((tmp_path / name / "traces.jsonl").read_bytes())
    assert written[0] == written[1] != written[2]


def test_what_is_left_out_is_told_with_its_reason(
    store: Store, slide_path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    made = pipeline(store, team(), attributes(), choice={"duplicates": 0.9})
    places = [(broken, None, "given"), (slide_path, None, "given"), (slide_path, None, "given")]
    done = caption_slides(places, made, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "dropped.csv").read_text().splitlines()))
    reasons = [row["reason"] for row in rows]
    assert reasons[0] == "the slide cannot be used"
    assert {*reasons[1:-1]} == {"near-duplicate"}
    assert reasons[-1] == "the same slide again"
    assert sum(done["dropped"].values()) == len(rows)
    assert done["slides"] == 1
    lost = pipeline(store, team(), attributes())
    with pytest.raises(DataError, match=r"broken\.svs"):
        caption_slides(places[:1], lost, tmp_path / "none")
    assert not (tmp_path / "none" / "captions.json").exists()


def test_a_run_that_was_stopped_leaves_nothing_whole_and_asks_only_for_the_rest(
    store: Store, slide_path: Path, tmp_path: Path
) -> None:
    class Gone(Echo):
        limit = 2

        def answer(
            self, samples: Sequence[Sample], decoding: Decoding | None = None
        ) -> Iterator[str]:
            if len(self.seen) >= self.limit:
                msg = "the budget is spent"
                raise ResourceError(msg)
            return super().answer(samples, decoding)

    gone, out, place = Gone(), tmp_path / "out", (slide_path, None, "given")

    def run() -> dict[str, Any]:
        agent = VisionModel(gone, store=Store(tmp_path / "answers"))  # type: ignore[arg-type]
        return caption_slides([place], pipeline(store, Agents(describe=agent), attributes()), out)

    with pytest.raises(ResourceError, match="budget"):
        run()
    assert not (out / "captions.json").exists()
    passes, gone.limit = Colours.passes, 99
    done = run()
    assert done["captions"] == len(gone.seen) > 2
    assert Colours.passes == passes


def test_captions_of_what_a_model_does_not_know_are_marked_wherever_they_stand(
    store: Store, slide_path: Path, tmp_path: Path
) -> None:
    class Lost(Echo):
        def unfamiliar(self, images: Sequence[Any]) -> list[Any]:
            return list(images)

    def run(unfamiliar: Unfamiliar) -> tuple[dict[str, Any], Path]:
        agent, out = VisionModel(Lost(), unfamiliar=unfamiliar), tmp_path / unfamiliar  # type: ignore[arg-type]
        made = pipeline(store, Agents(describe=agent), attributes())
        return caption_slides([(slide_path, None, "given")], made, out), out

    done, out = run("drop")
    assert (done["captions"], {*done["dropped"]}) == (0, {"no description"})
    done, out = run("keep")
    assert done["captions"] == done["agents"][f"captions {UNFAMILIAR}"] > 0
    (record, *_) = json.loads((out / "captions.json").read_text())
    assert record["unfamiliar"] == UNFAMILIAR
    trace = json.loads((out / "traces.jsonl").read_text().splitlines()[0])
    assert trace["steps"][0]["note"] == trace["unfamiliar"] == UNFAMILIAR
    alert = f'<p class="alert">The caption is {UNFAMILIAR}.</p>'
    assert (out / "report.html").read_text().count(alert) == done["captions"]


def test_a_prompt_agent_that_names_no_attributes_stops_before_anything_is_asked(
    store: Store,
) -> None:
    with pytest.raises(DataError, match=r"no attributes of any organ \(this is not JSON"):
        pipeline(store, team(), Scripted("Well:", "Still no list"))
    model = Scripted("Well:", '["red"]')
    assert pipeline(store, team(), model, cancer="luad").retriever.attributes == ("red",)
    assert "adenocarcinoma of the lung" in str(model.asked[0][0].content[0])


# --- wrong captions ----------------------------------------------------------------------


def test_corrupted_captions_teach_what_gives_back_the_good_one() -> None:
    text = "Large nuclei {i} are seen. The stroma is dense."
    good = [Sample(f"p{i}", ("a.png",), text.replace("{i}", str(i)), group="g") for i in range(40)]
    told: list[str] = []
    found = list(corrupted(good, lambda s, why: told.append(s.name + why)))
    assert not told
    again = list(corrupted(good[::-1], lambda *_: None))[::-1]
    assert found == again
    assert 1 <= sum(one.answer == "[]" for one in found) <= 14
    for one, right in zip(found, good, strict=True):
        wrong = one.turns[0].split("Caption: ")[1].split("\n")[0]
        assert apply(wrong, read_edits(one.answer)) == right.answer
        assert (wrong == right.answer) == (one.answer == "[]")
        assert (one.images, one.group) == (("a.png",), "g")
    assert one.turns[0] == agents.filled(WORDS["revise"], caption=wrong)


def test_a_models_mistakes_are_taken_where_they_can_be_taken_back() -> None:
    good = [Sample(f"p{i}", ("a.png",), "Large nuclei. Dense stroma.") for i in range(4)]
    swap = edit(op="modify", text="Large", to="Small")
    model = Scripted(swap, "no", swap, "[]", "[]", Reply("", "refused"))
    told: list[str] = []
    found = list(
        corrupted(good, lambda s, why: told.append(f"{s.name}: {why}"), model=model, untouched=0)
    )
    assert [one.name for one in found] == ["p0", "p1"]
    assert json.loads(found[0].answer) == [{"op": "modify", "text": "Small", "to": "Large"}]
    assert told == ["p2: an empty list spoils nothing", "p3: refused"]
    right = list(corrupted(good, lambda *_: None, model=Scripted(), untouched=1))
    assert [one.answer for one in right] == ["[]"] * 4
    assert np.unique([one.turns[0] for one in right]).size == 1


def test_rows_that_were_not_read_are_told_by_the_command(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.png").touch()
    path = tmp_path / "a.csv"
    path.write_text("image,caption\na.png,Small nuclei are seen.\ngone.png,Large ones.\n")
    code, out, err = run("data", "corrupt", str(path), str(tmp_path / "o.json"), "--json")
    told = json.loads(out)
    assert (code, told["not read"]) == (0, {"no such image file": 1})
    assert "no such image file" in err
    assert "Research use only" in told["notice"]
    assert told["wrong"] + told["left right"] == told["written"] == 1
    assert "gone.png" in (tmp_path / "o.dropped.csv").read_text()
    assert json.loads((tmp_path / "o.report.json").read_text())["written"] == 1
    facts = json.loads((tmp_path / "o.provenance.json").read_text())
    assert facts["input_digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts["seed"], facts["model"]) == (1, "none")
    assert "Small nuclei" in (tmp_path / "o.report.html").read_text() or told["left right"]
