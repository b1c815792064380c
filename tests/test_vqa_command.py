"""Files of answers, the report, the command and the judge of an evaluation of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from test_own import _patches, bert, images, llama, recipe, run_of
from test_vqa_eval import FEW, TEXTS, Fake, answered, asked, folder, letter_of

from pathcli.errors import DataError
from pathcli.evals import vqa_scores
from pathcli.evals.vqa import evaluate, read_predictions
from pathcli.evals.vqa_data import read_questions
from pathcli.evals.vqa_judge import judge, judge_interval
from pathcli.evals.vqa_report import write_vqa
from pathcli.metrics.vqa_text import multiset_recall, pa_llava_text
from pathcli.vlm.language import HFLanguage
from pathcli.weights import sha256

__all__ = ["_patches", "bert", "folder", "images", "llama"]  # fixtures


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty resamples do where only the means are looked at."""
    for name in ("bootstrap", "paired_bootstrap"):
        whole = getattr(vqa_scores, name)
        monkeypatch.setattr(
            vqa_scores, name, lambda *a, whole=whole, **k: whole(*a, **(k | {"replicates": FEW}))
        )


# --- files and the command ---------------------------------------------------------------


def predictions(path: Path, texts: dict[str, str]) -> Path:
    rows = [json.dumps({"id": name, "prediction": text}) for name, text in texts.items()]
    path.write_text("\n".join(rows))
    return path


def test_what_a_file_of_answers_lacks_or_has_too_much_of_is_one_line(folder: Path) -> None:
    questions = asked(folder)
    some = {k: v for k, v in TEXTS.items() if k != "blue open"}
    with pytest.raises(DataError, match=r"1 ids have no prediction \(the first: 'blue open'\)"):
        read_predictions(predictions(folder / "p.jsonl", some), questions)
    with pytest.raises(DataError, match=r"1 ids are not of q \(the first: 'green'\)"):
        read_predictions(predictions(folder / "p.jsonl", TEXTS | {"green": "x"}), questions)
    path = folder / "twice.csv"
    path.write_text("id,prediction\nred open,a\nred open,b\n")
    with pytest.raises(DataError, match="id 'red open' has two predictions"):
        read_predictions(path, questions)
    for order in ("5", "shuffled", "[0]", '[""0"",1,2]'):
        path.write_text(f'id,prediction,order\nred choice,a,"{order}"\n')
        with pytest.raises(DataError, match=r"'red choice': order .* is none of its options"):
            read_predictions(path, questions)
    path.write_text("id,said\nred open,a\n")
    with pytest.raises(DataError, match="record 1 needs id and prediction, it has id, said"):
        read_predictions(path, questions)


def test_a_part_of_a_set_needs_the_answers_to_that_part_alone(folder: Path) -> None:
    whole = asked(folder)
    part = whole.first(2)
    few = {q.id: TEXTS[q.id] for q in part.questions}
    path = predictions(folder / "p.jsonl", few)
    assert list(read_predictions(path, part, whole).answers) == list(few)
    path = predictions(folder / "p.jsonl", TEXTS)
    assert list(read_predictions(path, part, whole).answers) == list(few)
    path = predictions(folder / "p.jsonl", TEXTS | {"green": "x"})
    with pytest.raises(DataError, match="the first: 'green'"):
        read_predictions(path, part, whole)


@pytest.mark.usefixtures("quick")
def test_a_permuted_run_is_measured_alike_from_its_own_file(folder: Path) -> None:
    outcome = evaluate(
        read_questions(str(folder / "q.json")),
        model=lambda: Fake(letter_of("red")),
        responses=folder / "r.jsonl",
        permute=3,
        blind=True,
    )
    page = write_vqa(folder / "report", outcome, "pathcli vqa-eval")
    again = read_predictions(page.with_name("predictions.jsonl"), asked(folder))
    assert again.model == "report"  # all are called predictions.jsonl: the folder tells them apart
    assert again.answers == outcome.ours.answers
    kept = json.loads(page.with_name("metrics.json").read_text())
    assert kept["metrics"]["consistency"]["value"] == 1
    assert [row["answered by"] for row in kept["provenance"]["baselines"]] == [
        *("fake", "majority answer", "fake, blind", "guessing")
    ]
    html = page.read_text()
    assert "&lt;image&gt;USER: Which?\nA: red\nB: blue\nC: green ASSISTANT:" in html
    assert "Research use only" in html
    assert html.count("data:image/jpeg") == 4  # two units of right answers, two of wrong
    assert "max_new_tokens" in html


@pytest.mark.usefixtures("quick")
def test_the_command_scores_a_file_without_images_or_model(folder: Path, run: Run) -> None:
    (folder / "red.png").unlink()
    right = {"red closed": "yes", "blue closed": "no"}
    ours = predictions(folder / "ours.jsonl", TEXTS | right)
    theirs = predictions(folder / "theirs.jsonl", TEXTS)
    given = ["vqa-eval", str(folder / "q.json"), "--predictions", str(ours), "--json"]
    code, out, err = run(*given, "--compare", str(theirs), "--out", str(folder / "out"))
    assert code == 0, err
    found = json.loads(out)
    assert found["metrics"]["closed-first-word"]["value"] == 1
    assert found["provenance"]["comparison"][1]["difference"]["value"] == 0.5
    assert found["provenance"]["compared_with_sha256"] == sha256(theirs)
    assert found["notice"] == "Research use only; not for diagnosis."
    code, out, _ = run(*given, "--limit", "3", "--out", str(folder / "out"))
    assert code == 0
    assert json.loads(out)["metrics"]["overall"]["n"] == 1
    assert run(*given, "--permute", "2")[0] == 2
    code, _, err = run("vqa-eval", str(folder / "q.json"), "--model", "nonsense")
    assert code == 5  # the image that is gone, before any model is opened
    assert "3 of 6 questions have no image" in err


@pytest.mark.usefixtures("_patches", "quick")
def test_a_real_run_answers_from_its_folder_and_goes_on_from_what_it_kept(
    folder: Path, llama: str, images: Path, run: Run, tmp_path: Path
) -> None:
    once = {"epochs": 1, "batch": 4, "lr": 5e-3, "schedule": "constant"}
    place, _ = run_of(recipe(llama, images, tmp_path / "data", train=once), tmp_path)
    given = ["vqa-eval", str(folder / "q.json"), "--model", str(place), "--device", "cpu"]
    code, out, err = run(
        *given, "--limit", "2", "--json", "--tokens", llama, "--out", str(tmp_path / "out")
    )
    assert code == 0, err
    found = json.loads(out)
    read = found["provenance"]["as_read"]
    assert "USER: <image>" in read["closed"]["text"]
    recall = found["metrics"]["recall-pa-llava"]["value"]
    cut = HFLanguage(model=llama).tokenizer.tokenize
    lines = Path(found["report"]).with_name("predictions.jsonl").read_text().splitlines()
    by_hand = [
        multiset_recall(*(cut(pa_llava_text(row[name])) for name in ("prediction", "answer")))
        for row in map(json.loads, lines)
    ]
    assert recall == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert "Is it red?" in read["closed"]["text"]
    kept = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    assert len(kept) == found["provenance"]["counts"]["answers"] == 2
    code, out, _ = run(*given, "--limit", "3", "--json", "--out", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out" / "responses.jsonl").read_text().splitlines()[:2] == kept
    assert Path(json.loads(out)["report"]).is_file()


# --- the judge ---------------------------------------------------------------------------


class Judge:
    """Stands for a language model behind an endpoint; `say` answers what it is told."""

    model = "strict"

    def __init__(self, say: Any) -> None:
        self.say, self.told = say, list[str]()

    def ask_all(self, conversations: Any) -> Iterator[str]:
        for (message,) in conversations:
            self.told.append(message.content[0])
            yield self.say(message.content[0])


def test_a_judge_marks_open_answers_and_what_it_does_not_mark_is_counted(folder: Path) -> None:
    questions = asked(folder)
    strict = Judge(lambda _: "I would say 8/10.")
    found = judge(answered(questions, TEXTS), strict)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.marks, [np.nan, 8, np.nan, np.nan, 1, np.nan])
    assert (found.judge, found.unread, len(strict.told)) == ("strict", 0, 1)  # one is empty
    assert "The pathologist: a red square\nThe other: a red circle" in strict.told[0]
    assert judge_interval(answered(questions, TEXTS), found, FEW).value == 4.5
    for reply, mark in (("10", 10), ("0", np.nan), ("12", np.nan), ("1 to 10: 3", 3), ("", np.nan)):
        marked = judge(answered(questions, TEXTS), Judge(lambda _, r=reply: r))  # type: ignore[arg-type]
        np.testing.assert_array_equal(marked.marks[1], mark)
        assert marked.unread == int(np.isnan(mark))
