"""The task `generate`: images and words in, the answer's words learnt.

Every stage that ends in a language model is this task: which parts are trained is said by
their sections (`language.tune`, a connector always is), and `start.run` takes the weights of
a former stage by name. `train.choose` may name `exact_match`.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pathcli.data.pairs import pictures_of
from pathcli.encoders.augment import Augment
from pathcli.errors import DataError, UsageError
from pathcli.settings import TrainSettings, order
from pathcli.trainer import Work
from pathcli.types import digest
from pathcli.vlm.batches import Examples, StandIns
from pathcli.vlm.blind import NoConnector, NoEncoder
from pathcli.vlm.chat import Chat  # noqa: TC001 - builds the section `chat`
from pathcli.vlm.model import VisionLanguage
from pathcli.vlm.responders import Decoding
from pathcli.vlm.start import Start
from pathcli.vlm.tokens import CacheSettings, refuse_unless_still
from pathcli.vlm.towers import Views, prepared, refuse_pooled, sent, token_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pathcli.data.corpus import Corpus, CorpusData
    from pathcli.store import Store
    from pathcli.types import Encoder, Progress, Sample
    from pathcli.vlm.tokens import TokenCache

    Started = Callable[[str], Progress]

log = logging.getLogger("pathcli")

VALIDATED = 256
"""Validation sees at most so many samples, drawn once."""
LOOKED = 64
"""So many samples, evenly spaced, are told before training starts, to find bad ones early."""
ANSWERED = 32
"""Words of an answer in validation."""


class GenerateTask:
    """Learning to answer; the recipe's sections are its arguments."""

    def __init__(
        self,
        *,
        encoder: Encoder = NoEncoder(),  # noqa: B008 - has no state
        connector: Callable[..., Any] = NoConnector,
        language: Any,  # noqa: ANN401 - an HFLanguage, which imports transformers
        data: CorpusData,
        chat: Chat,
        train: TrainSettings,
        augment: Augment = Augment(),  # noqa: B008 - frozen
        start: Start = Start(),  # noqa: B008 - frozen
        cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen
        decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    ) -> None:
        """Keep the parts; nothing is read before `prepare`. `decoding` is of its answers later.

        Where there are no images (data of kind `texts`), encoder and connector are left out.

        Raises:
            UsageError: one of both without the other, an encoder without tokens, a choice by what
                is not measured, batches in pieces, two half precisions, or a cache beside images
                that change.
        """
        refuse_pooled(encoder)
        if isinstance(encoder, NoEncoder) != (connector is NoConnector):
            msg = "encoder and connector go together: give both, or none where there are no images"
            raise UsageError(msg)
        if train.choose not in {None, "exact_match"}:
            msg = f"train.choose: exact_match or null, not {train.choose!r}"
            raise UsageError(msg)
        if train.chunk is not None:
            msg = "train.chunk: pieces are for contrastive losses; generate takes train.accumulate"
            raise UsageError(msg)
        if {language.load, train.precision} == {"bfloat16", "float16"}:
            msg = f"language.load: {language.load} under train.precision: {train.precision} keeps "
            raise UsageError(msg + "each weight twice and converts it at every use; make them one")
        self.encoder, self.connector, self.language = encoder, connector, language
        self.data, self.chat, self.train = data, chat, train
        self.augment, self.start, self.cache = augment, start, cache
        self.decoding = decoding
        if cache.tokens != "off":
            refuse_unless_still(augment, connector)
        self._corpus: Corpus | None = None
        self._tokens: TokenCache | None = None
        self._shape: tuple[int, ...] = ()

    @property
    def corpus(self) -> Corpus:
        """The samples in use; known after `prepare`."""
        if self._corpus is None:
            msg = "call prepare first"
            raise RuntimeError(msg)
        return self._corpus

    def prepare(self, store: Store, *, device: str = "auto", progress: Started) -> None:
        """Read the tables of the data, load the encoder, and fill the store with its tokens.

        Raises:
            DataError: a table is wrong, or nothing is left of it.
            ResourceError: weights, files or space are missing.
            UsageError: the former stage had another encoder, or there are images and no encoder.
        """
        corpus = self._read()
        self.start.refuse_another(self.encoder)
        if self.cache.tokens != "off":  # what is missing is said before hours of encoding
            self.chat.stop(self.language.tokenizer)
        self._tokens, self._shape = prepared(
            corpus, self.encoder, store, self.cache, device=device, progress=progress
        )

    def _read(self) -> Corpus:
        self._corpus = corpus = self.data.corpus()
        if not len(corpus.train):
            msg = "there is no sample to train on"
            raise DataError(msg)
        if bool(corpus.train[0].images) == isinstance(self.encoder, NoEncoder):
            has, todo = ("images", "give") if corpus.train[0].images else ("no images", "leave out")
            msg = f"the samples have {has}: {todo} encoder and connector"
            raise UsageError(msg)
        return corpus

    def begin(self, seed: int) -> Work:
        """Return one seed's run, with modules of its own.

        Raises:
            DataError: first weights are of another architecture, or samples cannot be told.
            ResourceError: weights are not here.
        """
        del seed  # drawn from before, and the data are split once
        language = copy.deepcopy(self.language)
        facts: dict[str, Any] = {"language": dict(language.start())}
        connector = self.connector(self._shape[-1], language.width)
        facts["connector"] = dict(connector.start())
        module = VisionLanguage(self.encoder, connector, language)
        facts["start"] = dict(self.start.fill(module, ("connector.", "language.")))
        train, val = (self._examples(module, side) for side in (self.corpus.train, self.corpus.val))
        facts |= self._facts(self._examples(module, self.corpus.train))
        check = Validation(module, val, self.chat, self.corpus.val, self.train.choose is not None)
        return Work(
            module,
            self.corpus.train,
            check if len(self.corpus.val) else None,
            collate=train,
            lengths=[_length(s) for s in self.corpus.train] if self.train.by_length else None,
            identity=_identity(facts),
            facts=facts,
            conclude=lambda: _concluded(train, facts["warnings"]),
        )

    def sample_view(self, seed: int) -> list[tuple[str, str]]:
        """Return a training sample as pieces of text, each with its role.

        Roles are `read`, `learnt` and `image`. Of the language model nothing but the tokenizer
        is read, and of the encoder nothing where the number of its tokens is known.

        Raises:
            DataError: a table is wrong, or the sample cannot be told.
            ResourceError: the tokenizer is missing, or weights whose tokens are not known.
        """
        corpus = self._corpus or self._read()
        tokens, width = self._shape or token_shape(self.encoder)
        with torch.device("meta"):  # of the connector the count alone is asked
            count = self.connector(width, self.language.width).count(tokens)
        sample = corpus.train[order(seed, 0, len(corpus.train))[0]]
        rng, words = np.random.default_rng([seed, 0, 1, 0]), self.language.tokenizer
        counts, split = [count] * len(sample.images), self.language.seq2seq
        return list(self.chat.encode(sample, words, counts, rng, seq2seq=split).show())

    def _examples(self, module: VisionLanguage, samples: Sequence[Sample]) -> Examples:
        """Return what makes batches of one side; validation sees every image as it is."""
        still = samples is self.corpus.val
        augment = Augment() if still else self.augment
        side = self.encoder.input_px
        pictures = pictures_of(self.data, samples)
        views = Views(pictures, module.connector, augment, side, self._tokens)
        count = module.connector.count(self._shape[0])
        others = StandIns(samples, pictures.max_broken)
        return Examples(views, self.chat, module.connector, module.language, count, others=others)

    def _facts(self, examples: Examples) -> dict[str, Any]:
        corpus, rng = self.corpus, np.random.default_rng(0)
        n = len(corpus.train)
        some = [corpus.train[i * n // min(n, LOOKED)] for i in range(min(n, LOOKED))]
        told = [one for sample in some if (one := examples.tried(sample, rng))]
        lengths = np.array([len(one.ids) for one in told])
        learnt = np.array([sum(label >= 0 for label in one.labels) for one in told])
        cut = sum(one.truncated for one in told)
        warnings = list(corpus.warnings)
        if bad := len(some) - len(told):
            warnings.append(
                f"{bad} of {len(some)} samples looked at cannot be told; others stand in"
            )
        if cut:
            warnings.append(f"{cut} of {len(told)} samples looked at are longer than chat.limit")
        return {
            "data": corpus.digest,
            "encoder": self.encoder.id,
            "dropped": dict(corpus.dropped),
            "samples": {"train": n, "val": len(corpus.val)},
            "validated": min(len(corpus.val), VALIDATED),
            "visual tokens of an image": examples.count,
            "tokens of a sample": {"mean": float(lengths.mean()), "most": int(lengths.max())},
            "learnt of them": float(learnt.mean()),
            "warnings": warnings,
        }


def _identity(facts: Mapping[str, Any]) -> str:
    """Return what a run is known by: its data, and by their digests the weights it begins with."""
    named = [facts[name] for name in ("data", "samples", "encoder", "start")]
    return digest([*named, facts["language"]["source"], facts["connector"].get("init_sha256")])


def _concluded(examples: Examples, warnings: Sequence[str]) -> dict[str, Any]:
    """Return how many samples had to be stood in for since the run was last begun."""
    assert examples.others is not None  # noqa: S101 - as `begin` made them
    bad, tried = examples.others.counts
    if not bad:
        return {"stood in for": 0}
    said = f"{bad} of {tried} samples could not be told, and others stood in; raise chat.limit"
    log.warning("%s", said)
    return {"stood in for": bad, "warnings": [*warnings, said]}


def _length(sample: Sample) -> int:
    """Return about how long a sample is: its letters; an image is as long as any other."""
    return sum(map(len, (*sample.turns, sample.answer))) + 1_000 * len(sample.images)


class Validation:
    """A module's metrics on the validation samples, always the same ones.

    `loss` is the mean over batches; `exact_match`, where it is asked for, the share of greedy
    answers that equal the right one but for case and punctuation at the end.
    """

    def __init__(
        self,
        module: VisionLanguage,
        examples: Examples,
        chat: Chat,
        samples: Sequence[Sample],
        answers: bool,
    ) -> None:
        """Draw the samples."""
        self.module, self.examples, self.chat, self.answers = module, examples, chat, answers
        self.samples = [samples[i] for i in order(0, 0, len(samples))[:VALIDATED]]

    def __call__(self) -> dict[str, float]:
        """Return the metrics of the module as it stands."""
        losses, right = [], []
        for start in range(0, len(self.samples), 8):
            part = self.samples[start : start + 8]
            rng = np.random.default_rng([0, start])
            batch = sent(self.examples(part, rng), next(self.module.parameters()).device)
            losses.append(self.module.loss(batch).item())
            if self.answers:  # of a bad sample, what stands in for it is asked about
                part = [self.examples.learnt(sample, rng) for sample in part]
                said = answers(self.module, self.examples, part, max_new_tokens=ANSWERED)
                right += [_same(a, s.answer) for a, s in zip(said, part, strict=True)]
        found = {"loss": float(np.mean(losses))}
        return found | ({"exact_match": float(np.mean(right))} if right else {})


def answers(
    module: VisionLanguage,
    examples: Examples,
    samples: Sequence[Sample],
    **decoding: Any,  # noqa: ANN401 - of HFLanguage.generate
) -> list[str]:
    """Return a module's answers to samples' last questions, greedy unless `decoding` says else."""
    tokenizer = examples.language.tokenizer
    device = next(module.parameters()).device
    batch = sent(examples.ask(samples, np.random.default_rng(0)), device)
    ids = module.generate(batch, stop=examples.chat.stop(tokenizer), **decoding)
    return [str(text).strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _same(said: str, wanted: str) -> bool:
    return _plain(said) == _plain(wanted)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" .").lower()
