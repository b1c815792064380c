"""Cleaning by models that are asked: verdicts, money, and what is told before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from conftest import Run
from test_curation_clean import mixed
from test_llm import Server, server
from test_llm import said as answered
from test_llm import words as asked_of

from pathcli.curation.clean import Judges, clean
from pathcli.curation.clean_report import facts, summary, write_report
from pathcli.curation.judges import (
    ByColour,
    ByLanguage,
    ByLexicon,
    ByVision,
    Verdict,
    _picture,
    words,
)
from pathcli.curation.models import Reply, open_model

__all__ = ["server"]  # a fixture


class Says:
    """A vision-language model that answers by what is in the image."""

    name, digest, takes_schema = "says", "0" * 64, False

    def __init__(self, folder: Path, answers: dict[str, str]) -> None:
        self.answers = {_picture(str(folder / name)).data: said for name, said in answers.items()}

    def ask_all(self, conversations: Iterable[Any], *, max_tokens: int = 512) -> Iterator[Reply]:
        for messages in conversations:
            picture, question = messages[0].content
            assert question == words()["questions"]["image"]
            yield Reply(self.answers.get(picture.data, "Yes."))


class Replies:
    """A language model that answers by what is in the caption."""

    name, takes_schema = "replies", False

    def ask_all(self, conversations: Iterable[Any], *, max_tokens: int = 512) -> Iterator[Reply]:
        for messages in conversations:
            caption = messages[0].content[0].rpartition("Caption: ")[2]
            cut = "cut off at 16 tokens" * ("long" in caption)
            fault = "timed out" if "broken" in caption else cut
            said = "Yes, it is" if "mice" in caption else "No."
            yield Reply("Well, the" if "odd" in caption else said, fault)


def test_models_decide_where_they_are_named(tmp_path: Path) -> None:
    source, out = mixed(tmp_path / "in"), tmp_path / "out"
    answers = {"a.png": "No, a drawing.", "b.png": "Hm.", "night.png": "yes"}
    says = Says(tmp_path / "in", answers)
    judges = Judges(texts=ByLanguage(Replies()), images=ByVision(says))
    done = clean(source, out, judges, copies="none")
    assert dict(done.dropped) == {
        "not human": 1,
        "short caption": 1,
        "not pathology": 2,
        "image cannot be read": 1,
        "no such image file": 1,
    }
    assert done.undecided["says"] == 1


def test_a_fault_is_no_verdict_but_a_readable_answer_is_one(server: Server) -> None:
    captions = ["broken", "of mice", "{long} of mice", "long and odd"]
    found = ByLanguage(Replies())(captions)
    assert [verdict.out for verdict in found] == [None, True, True, None]
    assert [found[0].why, found[3].why] == ["timed out", "cut off at 16 tokens"]
    server.answer = lambda _: answered('```json\n{"answer": "no"}\n```')
    (verdict,) = ByLanguage(open_model(f"{server.url}#tiny"))(["a mole"])
    assert verdict == Verdict(out=False, why="says: no")
    asked = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert asked["properties"]["answer"]["enum"] == ["yes", "no"]


def test_a_sample_compares_cheap_with_dear_and_the_report_says_so(tmp_path: Path) -> None:
    source = mixed(tmp_path / "in")
    says = Says(tmp_path / "in", {"chart.png": "No.", "night.png": "Yes."})
    judges = Judges(ByLexicon(), ByColour(), ByLanguage(Replies()), ByVision(says), agree=50)
    done = clean(source, tmp_path / "out", judges)
    assert done.agreements["images"].table == ((4, 1), (0, 1))  # copies of a batch, too
    assert done.agreements["texts"].table[1] == (0, 1)
    page = write_report(done, facts(judges, {"seed": 0}), "pathcli data clean").read_text()
    assert "Research use only" in page
    assert "near.jpg" in page
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told == json.loads(json.dumps(summary(done)))
    assert told["agreement"]["images"]["precision"]["value"] == 0.5
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["judges"]["texts"]


def test_the_command_estimates_stops_at_its_budget_and_goes_on(
    server: Server, tmp_path: Path, run: Run
) -> None:
    source, out = mixed(tmp_path / "in"), tmp_path / "out"
    usage = {"prompt_tokens": 1000, "completion_tokens": 0}

    def answer(body: dict[str, Any]) -> Any:
        text = asked_of(body)
        animals = "Caption: " in text and "mice" in text
        drawn = len(server.bodies) == 8
        said = "yes" if animals or ("Caption: " not in text and not drawn) else "no"
        return 200, {"choices": [{"message": {"content": said}}], "usage": usage}, {}

    server.answer = answer
    url, table = f"{server.url}#tiny", str(source.path)
    given = ["data", "clean", table, "--llm", url, "--vlm", url, "--out", str(out), "--json"]
    given += ["--min-words", "5", "--store", str(tmp_path / "store"), "--workers", "1"]
    code, told, _ = run(*given, "--dry-run", "--price", "1,1")
    found = json.loads(told)
    assert (code, found["rows"], len(server.bodies), out.exists()) == (0, 10, 0, False)
    assert found["texts"]["requests"] == 8
    assert found["images"]["requests"] == 7  # at most: copies, too
    assert found["images"]["read"] > 7000
    assert found["texts"]["usd_most"] > found["texts"]["usd"] > 0
    code, _, err = run(*given, "--price", "1,0", "--budget", "0.005")
    assert (code, "budget of 0.005 USD" in err, len(server.bodies)) == (5, True, 4)
    assert not [*out.iterdir()]
    code, told, _ = run(*given, "--price", "1,0")
    found = json.loads(told)
    assert (code, found["dropped"]["not human"], found["dropped"]["not pathology"]) == (0, 1, 1)
    spent = found["spent"]
    assert spent["before"]["requests"] + spent["requests"] == len(server.bodies)
    assert spent["before"]["usd"] + spent["usd"] == len(server.bodies) / 1000
    kept = json.loads((out / "provenance.json").read_text())
    assert kept["format"] == "manifest"
    assert len(kept["input_digest"]) == 64
    assert "What the models took" in (out / "report.html").read_text()
    code, _, err = run(*given[:3], "--budget", "1", "--out", str(out))
    assert (code, "are for endpoints" in err) == (2, True)
