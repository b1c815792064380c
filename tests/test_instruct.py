"""Captions in; pairs of CLOVER's two kinds out: read, judged, written, paid once."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_llm import Server, said, server, words

from pathcli.cli import main
from pathcli.curation.instruct import Settings, captions, conversation, instruct
from pathcli.curation.models import open_model
from pathcli.curation.pairs import Fault, Pair, Seen, read_pairs, rules
from pathcli.curation.report import Dataset, write_report
from pathcli.data.formats import TALKS, Source, samples
from pathcli.data.outputs import ImageFolder
from pathcli.data.writers import write_samples
from pathcli.errors import ResourceError, UsageError
from pathcli.llm import Reply
from pathcli.store import Store
from pathcli.types import Region, Sample

__all__ = ["server"]

ONE, TWO = Pair("What is it?", "A gland."), Pair("Where are they?", "On the left.")

# --- reading -----------------------------------------------------------------------------


WAYS = {
    "clover": """question: "What is it?"
answer: "A gland."

question: "Where are they?"
answer: "On the left.\"""",
    "schema": """{"pairs": [{"question": "What is it?", "answer": "A gland."},
 {"question": "Where are they?", "answer": "On the left."}]}""",
    "fenced": """```json
[{"Question": "What is it?", "Answer": "A gland."},
 {"q": "Where are they?", "a": "On the left."}]
```""",
    "letters": """Q1: What is it?
A1: A gland.
Q2: Where are they?
A2: On the left.

That is all!""",
    "bold": """1. **Question:** What is it?
   **Answer:** A gland.
2. **Question:** Where are they?
   **Answer:** On the left.""",
    "numbers": """1. What is it?
- A gland.
2. Where are they?
- On the left.""",
    "one line": """Question 1: "What is it?" Answer: "A gland."
Question 2: "Where are they?" Answer: "On the left.\"""",
}


@pytest.mark.parametrize("reply", WAYS.values(), ids=WAYS.keys())
def test_pairs_are_read_however_they_are_written(reply: str) -> None:
    assert read_pairs(reply) == ([ONE, TWO], [])


def test_what_is_no_pair_is_told_and_the_last_of_a_cut_reply_is_left_out() -> None:
    lines = 'question: "What is it?"\nanswer: "A gland."\nquestion: "Where are they?"'
    assert read_pairs(lines) == ([ONE], [Fault("badly formed", "no answer: Where are they?")])
    assert read_pairs(lines, cut=True) == ([ONE], [Fault("cut off", "Where are they?")])
    whole = lines + '\nanswer: "On the'
    assert read_pairs(whole, cut=True) == ([ONE], [Fault("cut off", "Where are they?")])
    found = '{"pairs": [{"question": "What is it?", "answer": "A gland."}, {"question": "Wh'
    assert read_pairs(found, cut=True) == ([ONE], [Fault("cut off")])
    assert read_pairs("A gland.") == ([], [Fault("badly formed", "no question: A gland.")])
    assert read_pairs("answer: A gland.")[1] == [Fault("badly formed", "no question: A gland.")]


# --- judging -----------------------------------------------------------------------------

GOOD = "What do the nuclei look like?"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        (GOOD, "They are large and dark, of grade 2, and stain for p53.", None),
        (GOOD, "There is no atypia in the context of inflammation; the texture is fine.", None),
        ("Which one?", "The large one is on the left.", "question too short"),
        (f"Is it {'very ' * 40}large?", "It is.", "question too long"),
        (GOOD, "large " * 121, "answer too long"),
        ("What does the caption say?", "They are large.", "gives away the text"),
        (GOOD, "They are, as mentioned, large.", "gives away the text"),
        (GOOD, "At 40x they are large.", "numbers"),
        (GOOD, "They measure 12 \u00b5m.", "numbers"),
        (GOOD, "In 1999 they were large.", "numbers"),
        (GOOD, "At low-power they are large.", "numbers"),
        (GOOD, "They are large; please consult a pathologist.", "advice"),
        (
            "Qu'est-ce que c'est ?",
            "Les noyaux sont grands et sombres dans la coupe.",
            "not in English",
        ),
        (GOOD, "\u7ec6\u80de\u6838\u5927 \u6df1\u67d3 \u5728 \u8fd9 \u91cc", "not in English"),
        ("Where can normal crypts be found?", "Below them.", "copied from the example"),
    ],
)
def test_a_pair_is_left_out_for_what_it_says(question: str, answer: str, reason: str) -> None:
    fault = rules().fault(Pair(question, answer))
    assert (fault.reason if fault else None) == reason


def test_of_a_template_the_answer_alone_is_judged() -> None:
    ours = "Give a detailed description."
    assert rules().fault(Pair(ours, "It is skin with a lesion."), template=True) is None
    fault = rules().fault(Pair(ours, "Skin at 10x is shown here."), template=True)
    assert fault == Fault("numbers", "10x")


def test_copies_are_known_within_a_caption_and_among_all() -> None:
    seen = Seen()
    assert seen.fault(ONE) is None
    assert seen.fault(Pair("WHAT is it", "Another.")).reason == "duplicate in its caption"  # type: ignore[union-attr]
    seen.next()
    assert seen.fault(ONE).reason == "duplicate of another caption's"  # type: ignore[union-attr]
    assert seen.fault(Pair("What is it?", "A duct.")) is None


# --- making ------------------------------------------------------------------------------


class Scripted:
    """Says the caption's number in two pairs; of caption 2 nothing, of 3 half."""

    name = "scripted"

    def ask_all(self, conversations: Any, **given: Any) -> Any:
        for talk in conversations:
            text = talk[-1].content[0]
            number = int(text.split()[-1])
            pairs = f"Q: What is on the left here?\nA: Gland {'i' * number}.\n"
            pairs += f"Q: What is on the right here?\nA: Duct {'i' * number} at 40x."
            replies = {2: Reply("", "refused: no"), 3: Reply(pairs, "cut off at 9 tokens")}
            yield replies.get(number, Reply(pairs))


def table(folder: Path, rows: int) -> Path:
    for n in range(rows):
        (folder / f"{n}.png").touch()
    lines = [{"image": f"{n}.png", "caption": f"Skin with glands, part {n}"} for n in range(rows)]
    path = folder / "captions.json"
    path.write_text(json.dumps(lines))
    return path


def test_instructions_are_written_in_both_forms_with_where_they_are_from(tmp_path: Path) -> None:
    path, out = table(tmp_path, 5), tmp_path / "out"
    made = instruct(Source(path), out, Scripted(), Settings(seed=1))
    kept = json.loads((out / "clover.json").read_text())
    assert Counter(row["kind"] for row in kept) == {"generated": 4}
    row = kept[1]
    assert (row["question"], row["answer"]) == ("What is on the left here?", "Gland i.")
    assert (row["path"], row["caption_id"], row["model"]) == ("../1.png", "1.png", "scripted")
    talks = list(samples(Source(out / "llava.json"), "llava", TALKS))
    assert [talk.answer for talk in talks] == [row["answer"] for row in kept]
    assert list(samples(Source(out / "clover.json"), "questions", TALKS))[3].answer == "Gland iiii."
    with (out / "dropped.csv").open() as file:
        reasons = Counter((row["kind"], row["reason"]) for row in csv.DictReader(file))
    assert reasons == {
        ("template", "numbers"): 5,
        ("generated", "numbers"): 3,
        ("generated", "no answer"): 1,
        ("generated", "cut off"): 1,
    }
    told = made.data.passed("generated")
    assert (told["value"], told["n"]) == (4 / 9, 9)


def test_pathgen_needs_no_slides_and_keeps_their_positions(tmp_path: Path) -> None:
    row = {"wsi_id": "TCGA-AA-1111-01Z", "position": ["3", "4"], "caption": "Skin is seen here."}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row, row | {"position": None}]))
    source = Source(path)
    (given,) = captions(source, tmp_path)
    assert (given.path, given.group) == ("TCGA-AA-1111-01Z_3_4.png", "TCGA-AA-1111")
    assert source.dropped.total() == 1
    lost = instruct(Source(path), tmp_path / "out", None, Settings(kinds=("template",)))
    assert lost.unread == {"no slide, position or caption": 1}
    assert "row 2,,no slide, position" in (tmp_path / "out" / "dropped.csv").read_text().replace(
        '"', ""
    )
    (talk,) = json.loads((tmp_path / "out" / "llava.json").read_text())
    assert (talk["wsi_id"], talk["position"], talk["type"]) == (
        row["wsi_id"],
        ["3", "4"],
        "template",
    )
    with pytest.raises(UsageError, match="needs a model"):
        instruct(Source(path), tmp_path / "no", None, Settings())


def test_squares_of_another_size_are_named_as_their_files_are(slide_path: Path) -> None:
    region = Region(str(slide_path), (0, 64), 64)
    path = slide_path.parent / "a.json"
    write_samples([Sample("a", (region,), "Skin is seen here.")], path, "pathgen")
    (given,) = captions(Source(path), path.parent)
    assert given.path == Path(ImageFolder(path.parent / "made").file(region)).name


def test_half_a_character_costs_no_file(tmp_path: Path) -> None:
    half = "Skin \\ud83d is seen."
    pairs = f'{{"pairs": [{{"question": "\\ud83d is it?", "answer": "A {half}"}}]}}'
    bad = pairs.replace("A Skin", "A caption of Skin")
    replies = iter([Reply(pairs), Reply(bad)])

    class Half:
        name, digest = "half", "0"

        def ask_all(self, conversations: Any, **_: Any) -> Any:
            yield from (next(replies) for _ in conversations)

    out = tmp_path / "out"
    made = instruct(
        Source(table(tmp_path, 2)), out, Half(), Settings(kinds=("generated",), form="json")
    )
    write_report(out, "A", "B", made.data, {}, told={}, command="")
    assert len(json.loads((out / "clover.json").read_text())) == 1
    assert made.data.dropped["generated"].total() == 1
    assert (out / "report.html").exists()


def test_the_example_stands_in_the_prompt_in_the_form_that_is_asked_for() -> None:
    for form in ("lines", "json"):
        rule, _, shown, last = conversation("Skin.", form)  # type: ignore[arg-type]
        pairs, faults = read_pairs(str(shown.content[0]))
        assert (len(pairs), faults) == (4, [])
        assert "Skin." in last.content
        assert ("JSON" in str(rule.content[0])) == (form == "json")


SCRIPT = """
import sys
from pathlib import Path
from pathcli.curation.instruct import Settings, instruct
from pathcli.curation.models import open_model
from pathcli.data.formats import Source
from pathcli.store import Store
url, table, store, out = sys.argv[1:]
model = open_model(url, store=Store(store), workers=2)
instruct(Source(Path(table)), Path(out), model, Settings(kinds=("generated",), form="json"))
"""


def test_a_killed_run_goes_on_and_nothing_is_paid_twice(
    server: Server,
    tmp_path: Path,
) -> None:
    path, out, store, paid = table(tmp_path, 12), tmp_path / "out", tmp_path / "store", list[str]()
    stuck, go = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if len(paid) >= 6 and not go.is_set():
            stuck.set()
            go.wait(60)
            return 500, "gone", {}
        paid.append(words(body))
        return said(
            json.dumps({"pairs": [ONE._asdict() | {"answer": f"Gland {'i' * len(paid)}."}]})
        )

    server.answer = answer
    name = f"{server.url}#tiny"
    command = [sys.executable, "-c", SCRIPT, name, str(path), str(store), str(out)]
    run = subprocess.Popen(command)
    assert stuck.wait(120)
    kept = next((store / "responses").iterdir())
    while kept.read_text().count("\n") < 6:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "clover.json").exists()
    assert len([*out.glob(".*.part")]) == 3
    go.set()
    settings = Settings(kinds=("generated",), form="json")
    made = instruct(Source(path), out, open_model(name, store=Store(store), workers=2), settings)
    assert made.data.kept["generated"] == 12
    assert {path.name for path in out.iterdir()} == {"clover.json", "llava.json", "dropped.csv"}
    assert Counter(paid) == Counter(f"Skin with glands, part {n}" for n in range(12))
    assert len(json.loads((out / "clover.json").read_text())) == 12
    asked = server.bodies[-1]["response_format"]["json_schema"]
    assert asked["schema"]["required"] == ["pairs"]


def test_the_command_estimates_stops_at_its_budget_and_reports(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = table(tmp_path, 4), tmp_path / "out"
    usage = {"prompt_tokens": 1000, "completion_tokens": 1000}
    numbers = iter(range(9))

    def answer(_: dict[str, Any]) -> Any:
        pairs = {"pairs": [TWO._asdict() | {"answer": f"On the {'i' * next(numbers)}left."}]}
        return 200, {"choices": [{"message": {"content": json.dumps(pairs)}}], "usage": usage}, {}

    server.answer = answer
    given = ["data", "instruct", str(path), "--model", f"{server.url}#tiny", "--out", str(out)]
    given += ["--store", str(tmp_path / "store"), "--price", "1,1", "--json", "--workers", "1"]

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as stop:
            main([*given, *more])
        return int(stop.value.code or 0), json.loads(capsys.readouterr().out)

    code, told = run("--dry-run")
    assert (code, told["requests"], told["kept"], len(server.bodies)) == (0, 4, 0, 0)
    code, told = run("--budget", "0.0045")
    assert (code, len(server.bodies)) == (5, 2)
    assert not (out / "clover.json").exists()
    code, told = run()
    assert (code, len(server.bodies), told["requests"], told["usd"]) == (0, 4, 2, 0.004)
    assert told["kept"] == {"generated": 4}
    page = (out / "report.html").read_text()
    for text in ("Research use only", "skin", "words of an answer", "On the iileft.", "numbers"):
        assert text in page
    before = {"requests": 2, "tokens_read": 2000, "tokens_written": 2000, "usd": 0.004}
    assert told["before"] == before
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["prompt"]["form"] == "json"
    assert facts["input_digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts["format"], facts["images"]) == ("manifest", "None")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "who writes the pairs"),
        (["--kinds", "template", "--model", "x"], "asks no model"),
        (["--kinds", "pictures"], "kinds are generated and template"),
        (["--model", "smollm2-135m", "--budget", "1"], "are for endpoints"),
        (["--model", "http://localhost/v1#a", "--price", "1"], "two numbers"),
        (["--model", "http://localhost/v1#a", "--budget", "1"], "give --price"),
        (["--model", "a", "--reply", "xml"], "auto, lines or json"),
    ],
)
def test_options_that_do_not_go_together_are_told(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data", "instruct", str(table(tmp_path, 1)), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*given, "--store", str(tmp_path / "store"), *options])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_endpoint_that_is_gone_leaves_no_half_files(
    server: Server,
    tmp_path: Path,
) -> None:
    path, out = table(tmp_path, 3), tmp_path / "out"
    server.answer = lambda _: (401, "who?", {})
    with pytest.raises(ResourceError, match="lets nobody in"):
        instruct(Source(path), out, open_model(f"{server.url}#tiny"), Settings())
    assert not any(out.iterdir())


def test_a_data_set_counts_parts_of_the_body_types_and_lengths() -> None:
    data = Dataset({"skin": ["skin", "derm*"], "lung": ["lung"]})
    data.add("generated", "a", Pair("What is seen?", "Dark cells."), "Dermal lung")
    data.add("generated", "a", Pair("Where is it now?", "Left."), "Dermal lung")
    data.add("template", "b", Pair("Describe it.", "It is unclear."), "No organ")
    told = data.summary()
    assert told["body_parts"] == {"skin": 2, "not named": 1}
    assert told["question_types"] == {"What": 1, "Where": 1, "Describe": 1}
    assert told["question_words"] == {"mean": 3.0, "median": 3, "min": 2, "max": 4}
    assert len(data.examples) == 3
