"""Samples in, a file in one of the common forms out: streamed, whole or not at all.

What a form holds (what it does not is counted in `Written`, never lost in silence):

    form        a record is                        images    says            label  group
    llava       {id, image, conversations}         several   turns           yes    yes
    pallava     the same, a line each (JSONL)      one       turns           yes    yes
    clover      {question, answer, path}           one       one question    yes    yes
    pathgen     {wsi_id, position, caption}, or    region    captions, or    no     the
                {wsi_id, position, conversations}            turns                  patient
    csv         image, caption or question, answer one       captions, or    yes    yes
                                                             one question
    jsonl       {image, caption or conversations}  several   captions, or    yes    yes
    parquet     the same                           several   turns           yes    yes
    webdataset  1.jpg with 1.txt and 1.json        one       captions and    yes    yes
                                                             turns

Images stay files, named from the table's folder. Where they are squares of slides or lie in
archives, they are cut or copied into a folder the caller names; `webdataset` takes their bytes
in, and so does `parquet` (one image a row, then) where no folder is named. A region becomes a
PNG, its position then stands in its name alone. Names of samples are not kept: `id` is a running
number (`webdataset` has the name in its JSON); nor are "<image>" marks where there is a column
for the question, while `llava` and `pallava` get them where they lack.

A caption has no question. Forms of questions alone are given one (`DESCRIBE`, or the caller's).
Where a file holds captions or turns, the first sample decides; the caller's question makes turns
of all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pathcli.data.formats import TALKS, Source, samples
from pathcli.data.formats.conversations import MARK
from pathcli.data.formats.published import PATHGEN_PX
from pathcli.data.formats.source import patient
from pathcli.data.images import image_name
from pathcli.data.outputs import (
    ImageFolder,
    UnheldError,
    dumped,
    image_bytes,
    name_from,
    whole,
    write_records,
)
from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.types import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pathcli.types import ImageRef, Sample

Form = Literal["llava", "clover", "pallava", "pathgen", "csv", "jsonl", "parquet", "webdataset"]
DESCRIBE = "Describe this image."

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "llava": (".json", ".jsonl"),
    "clover": (".json", ".jsonl"),
    "pallava": (".jsonl",),
    "pathgen": (".json", ".jsonl"),
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "webdataset": (".tar", ""),
}
_ONE_IMAGE = {"clover", "pallava", "csv", "webdataset"}
_ONE_QUESTION = {"clover", "csv"}
_TALKS_ALONE = {"llava", "clover", "pallava"}
_NO_FILES = "its images are squares of slides or lie in archives; give --write-images DIR"

_GDC = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # a file's id, a folder's name
_THREADS = 4
_BATCH = 64
_SHARD = 1 << 29  # bytes


@dataclass
class Written:
    """What became of the samples: `left` were not written, `notes` say what others lost.

    `unread` counts the rows of the input that gave no sample, where there was an input.
    """

    form: str
    path: Path
    rows: int = 0
    left: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def told(self) -> list[str]:
        """Return what is not in the file as sentences, each with a count and an example."""
        kinds = ("not read", self.unread), (f"{self.form} cannot hold them", self.left)
        lines = [
            f"{count} rows left out, {what}: {why} (e.g. {self.examples[why]})"
            for what, counts in kinds
            for why, count in counts.most_common()
        ]
        return lines + [f"{count} {what}" for what, count in self.notes.items()] + self.warnings

    def leave(self, why: str, name: str) -> None:
        """Count a sample that is not written."""
        self.left[why] += 1
        self.examples.setdefault(why, name)


def convert(
    path: Path,
    out: Path,
    to: Form,
    *,
    layout: str = "auto",
    images: Path | None = None,
    write_images: Path | None = None,
    question: str | None = None,
) -> Written:
    """Write what a file, folder or shards hold in another form; see `write_samples`.

    `layout` is that of `path` (`pathcli.data.formats`), `images` the folder of its images or
    slides.

    Raises:
        UsageError: `out` is `path`, or cannot be of this form.
        DataError: nothing can be read or nothing written.
        ResourceError: something is not there.
    """
    path, out = path.expanduser().absolute(), out.expanduser().absolute()
    if out.resolve() == path.resolve():
        msg = f"{out}: would be written over itself; give another file"
        raise UsageError(msg)
    source = Source(path, images and images.expanduser().absolute(), bare=True)
    found = samples(source, layout, TALKS)
    root = None if write_images else source.images
    try:
        done = write_samples(
            found, out, to, root=root, write_images=write_images, question=question
        )
    except DataError as error:
        if not source.dropped:
            raise
        why = ", ".join(f"{why} {count}" for why, count in source.dropped.most_common())
        msg = f"{error}; of {source.rows} rows of {path} were not read: {why}"
        raise DataError(msg) from error
    done.unread, done.warnings = source.dropped, source.warnings
    done.examples = source.examples | done.examples
    return done


def write_samples(
    found: Iterable[Sample],
    path: Path,
    form: Form,
    *,
    root: Path | None = None,
    write_images: Path | None = None,
    question: str | None = None,
    shard: int = _SHARD,
) -> Written:
    """Write samples as `path`, in order, and return what could not be kept.

    Args:
        found: samples, taken one batch at a time.
        path: the file; for webdataset a .tar, or a folder of shards.
        form: see the module.
        root: what names of images are relative to (default: the folder of `path`).
        write_images: folder for regions and members of archives, as image files.
        question: what captions are made answers to.
        shard: bytes from which a new shard is begun.

    Raises:
        UsageError: an unknown form, an ending it does not have, or a folder that is there.
        DataError: nothing can be written, or images would need a folder and none is given.
        ResourceError: the disk is full or closed, or pyarrow is not installed.
    """
    path = path.expanduser().absolute()
    _check(path, form)
    rest = iter(found)
    first = next(rest, None)
    work = _Work(form, path, (root or path.parent).absolute(), write_images, question)
    work.begin(first)
    with whole(path) as part:
        every = rest if first is None else chain([first], rest)
        write_records(work.records(every), part, path.suffix.lower(), shard)
        if not work.done.rows:
            why = "; ".join(work.done.told()) or "there is none"
            msg = f"{path}: no sample can be written as {form}: {why}"
            raise DataError(msg)
    return work.done


def form_of(path: Path, first: Sample) -> Form:
    """Return the form that a file of this name has, for samples such as the first.

    Raises:
        UsageError: no form has this ending.
    """
    if all(isinstance(ref, Region) for ref in first.images) and path.suffix in {".json", ".jsonl"}:
        return "pathgen"
    known: dict[str, Form] = {".json": "llava", ".tar": "webdataset", "": "webdataset"}
    known |= {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if path.suffix.lower() not in known:
        msg = f"{path}: ends in none of {', '.join(filter(None, known))}"
        raise UsageError(msg)
    return known[path.suffix.lower()]


def _check(path: Path, form: str) -> None:
    if form not in _SUFFIXES:
        msg = f"no form is called {form!r}: {did_you_mean(form, [*_SUFFIXES])}"
        raise UsageError(msg)
    if path.suffix.lower() not in _SUFFIXES[form]:
        ends = " or ".join(end or "without ending, a folder" for end in _SUFFIXES[form])
        msg = f"{path}: a file of {form} is called {ends}"
        raise UsageError(msg)
    if path.is_dir():
        msg = f"{path}: a folder is there; remove it or give another name"
        raise UsageError(msg)


# --- records -----------------------------------------------------------------------------


class _Work:
    """One file being written: samples in, records out."""

    def __init__(
        self, form: str, path: Path, root: Path, images: Path | None, question: str | None
    ) -> None:
        self.form, self.root, self.question = form, root, question
        self.done = Written(form, path)
        self.folder = ImageFolder(images) if images else None
        self.embeds = form == "webdataset"
        self.talks: bool | None = None

    def begin(self, first: Sample | None) -> None:
        """Decide what the first sample decides."""
        refs = first.images if first else ()
        archived = any(not isinstance(ref, str) for ref in refs)
        self.embeds |= self.form == "parquet" and archived and self.folder is None
        if self.form != "webdataset":
            said = bool(first and first.turns) or self.question is not None
            self.talks = said or self.form in _TALKS_ALONE

    def records(self, found: Iterator[Sample]) -> Iterator[dict[str, Any]]:
        """Yield the records of the samples that the form can hold, and count the others."""
        if self.embeds:
            found = self._grouped(found)
        with ThreadPoolExecutor(_THREADS) as pool:
            while batch := list(islice(found, _BATCH)):
                for sample, made in zip(batch, pool.map(self._tried, batch), strict=True):
                    if isinstance(made, str):
                        self.done.leave(made, sample.name)
                        continue
                    self._note(sample)
                    self.done.rows += 1
                    yield {"id": str(self.done.rows)} | made if "conversations" in made else made

    def _grouped(self, found: Iterator[Sample]) -> Iterator[Sample]:
        """Give samples of one image, which will be copies, that image as their group."""
        for _, run in groupby(found, key=lambda sample: sample.images):
            same = list(run)
            for sample in same:
                if len(same) > 1 and not sample.group:
                    self.done.notes["rows share an image, whose name is now their group"] += 1
                    yield replace(sample, group=sample.name)
                else:
                    yield sample

    def _note(self, sample: Sample) -> None:
        notes = self.done.notes
        if not sample.turns and self._asks(sample):
            notes[f"captions are now answers to {self.question or DESCRIBE!r}"] += 1
        if self.form == "pathgen" and sample.label:
            notes["labels are not kept: pathgen has none"] += 1
        if self.form == "pathgen" and sample.group != patient(_wsi(sample)):
            notes["groups are not kept: pathgen has the patient of its slide alone"] += 1

    def _asks(self, sample: Sample) -> bool:
        """Return whether a sample is written with a question."""
        told = bool(sample.turns) or self.question is not None
        return told if self.talks is None else self.talks

    def _tried(self, sample: Sample) -> dict[str, Any] | str:
        """Return the record of a sample, or why there is none."""
        try:
            return self._fault(sample) or self._record(sample)
        except UnheldError as unheld:
            return str(unheld)
        except UnicodeEncodeError:
            return "half a character, which is no text in UTF-8"

    def _fault(self, sample: Sample) -> str:
        """Return why a sample cannot be held, "" if nothing is known yet."""
        turns, images = sample.turns, sample.images
        single = self.embeds or self.form in _ONE_IMAGE
        known = {
            "an empty text": not all(text.strip() for text in (*turns, sample.answer)),
            "question and answer do not alternate": bool(turns) and len(turns) % 2 == 0,
            "a conversation among captions; --question writes all so": bool(turns)
            and not self._asks(sample),
            "several turns": len(turns) > 1 and self.form in _ONE_QUESTION,
            "no image": not images,
            "several images": len(images) > 1 and single,
        }
        if self.form == "pathgen":
            known["no region of a slide"] = not _is_place(images)
        return next((why for why, so in known.items() if so), "")

    def _record(self, sample: Sample) -> dict[str, Any]:
        said = self._said(sample)
        if self.form == "pathgen":
            return _place(sample) | said
        if self.form == "webdataset":
            return self._member(sample, said)
        image = self._image(sample)
        if self.form == "clover":
            return said | {"path": image} | _known(sample)
        if self.form not in {"csv", "parquet"}:
            return {"image": image} | said | _known(sample)
        facts = {"label": sample.label, "group": sample.group}
        json.dumps(["" if self.embeds else image, said, facts], ensure_ascii=False).encode()
        return {"image": image} | said | facts

    def _said(self, sample: Sample) -> dict[str, Any]:
        """Return what is said as the form calls it."""
        turns = sample.turns or (self.question or DESCRIBE,)
        if not self._asks(sample):
            return {"caption": sample.answer}
        if self.form in _ONE_QUESTION:
            return {"question": turns[0].replace(MARK, "").strip(), "answer": sample.answer}
        texts = [*turns, sample.answer]
        if self.form in {"llava", "pallava"} and not any(MARK in text for text in texts):
            texts[0] = f"{MARK}\n" * len(sample.images) + texts[0]
        roles = ("human", "gpt")
        said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"conversations": said}

    def _image(self, sample: Sample) -> Any:  # noqa: ANN401 - a name, names or bytes
        if self.embeds:
            data, suffix = image_bytes(sample.images[0])
            return {"bytes": data, "path": PurePosixPath(sample.name).stem + suffix}
        names = [self._name(ref) for ref in sample.images]
        return names if self.form == "parquet" or len(names) > 1 else names[0]

    def _name(self, ref: ImageRef) -> str:
        if not isinstance(ref, str):
            if self.folder is None:
                msg = f"{image_name(ref)}: {self.form} names image files, but {_NO_FILES}"
                raise DataError(msg)
            ref = self.folder.file(ref)
        return name_from(self.root, ref)

    def _member(self, sample: Sample, said: dict[str, Any]) -> dict[str, Any]:
        data, suffix = image_bytes(sample.images[0])
        facts = {"name": sample.name} | _known(sample)
        if "caption" in said:
            return {suffix: data, ".txt": said["caption"].encode(), ".json": dumped(facts)}
        return {suffix: data, ".json": dumped(facts | said)}


def _known(sample: Sample) -> dict[str, str]:
    facts = {"label": sample.label, "group": sample.group}
    return {what: text for what, text in facts.items() if text}


def _is_place(images: Sequence[ImageRef]) -> bool:
    ref = images[0] if len(images) == 1 else None
    return isinstance(ref, Region) and min(ref.xy) >= 0


def _place(sample: Sample) -> dict[str, Any]:
    """Return where a sample's region is, in PathGen's words."""
    ref: Any = sample.images[0]  # a Region, see `_is_place`
    place: dict[str, Any] = {"wsi_id": _wsi(sample), "position": [str(at) for at in ref.xy]}
    folder = Path(ref.slide).parent.name
    place |= {} if ref.side0 == PATHGEN_PX else {"side": ref.side0}
    return place | ({"file_id": folder} if _GDC.fullmatch(folder) else {})


def _wsi(sample: Sample) -> str:
    """Return the id of a region's slide: as PathGen's record had it, else its file's stem."""
    ref = sample.images[0]
    if not isinstance(ref, Region):
        return ""
    told = sample.name.removesuffix(f"_{ref.xy[0]}_{ref.xy[1]}")
    known = told != sample.name and Path(ref.slide).name.startswith(told)
    return told if known else Path(ref.slide).stem
