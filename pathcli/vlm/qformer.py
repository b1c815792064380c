"""The Q-Former: an image's tokens in, a few states that say what is asked of it out.

A BERT with learnt queries before its words. In every second layer the queries also attend to
the image, and they have feed-forward layers of their own; words go through BERT's. Who sees
whom decides what it does: `look`, `read`, `together`, `write`. Sources: BLIP-2
(arXiv:2301.12597), section 3; InstructBLIP (arXiv:2305.06500), section 2.3, where the queries
see the question, too; CLOVER trains both.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from pathcli.encoders.checkpoint import shape_faults
from pathcli.errors import DataError, UsageError
from pathcli.vlm.connectors import Frame, framed
from pathcli.vlm.qformer_weights import located, read_qformer
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.types import ByteArray

    Text = Mapping[str, Tensor]

log = logging.getLogger("pathcli")

_BERT, _BASE, _SPREAD, _EPS = "bert-base-uncased", 768, 0.02, 1e-12


class Attention(nn.Module):
    """BERT's attention: states, and what they attend to, in; states out."""

    def __init__(self, width: int, heads: int, dim_in: int, dropout: float) -> None:
        """Attend from `width` to rows of `dim_in`."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(dim_in, width), nn.Linear(dim_in, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.drop = nn.Dropout(dropout)

    def forward(self, states: Tensor, among: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return [b, t, w] for states [b, t, w], `among` [b, s, d], `mask` bool [b, 1, t, s]."""
        parts = (self.query(states), self.key(among), self.value(among))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        rate = self.dropout if self.training else 0.0
        found = scaled_dot_product_attention(query, key, value, mask, dropout_p=rate)
        rows: Tensor = self.norm(states + self.drop(self.out(found.transpose(1, 2).flatten(2))))
        return rows


class Feed(nn.Module):
    """BERT's feed-forward layer: states [b, t, w] in and out."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        """Go through `hidden`."""
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.drop = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Return [b, t, w]."""
        rows: Tensor = self.norm(states + self.drop(self.down(gelu(self.up(states)))))
        return rows


class Layer(nn.Module):
    """One layer: queries and words attend to each other, queries to the image, each its way on."""

    def __init__(self, own: Attention, cross: Attention | None, feeds: Sequence[Feed]) -> None:
        """Take the attentions, and the feed-forward layers of the queries and of the words.

        Without one for the words they are seen here for the last time.
        """
        super().__init__()
        self.own, self.cross, self.queries = own, cross, feeds[0]
        self.words = feeds[1] if len(feeds) > 1 else None

    def forward(self, states: Tensor, queries: int, image: Tensor, mask: Tensor | None) -> Tensor:
        """Return [b, q + t, w] of as many states, the first `queries` of which see `image`."""
        going = states if self.words is not None else states[:, :queries]
        states = self.own(going, states, mask)
        asked, said = states[:, :queries], states[:, queries:]
        if queries and self.cross is not None:
            asked = self.cross(asked, image)
        parts = [self.queries(asked)] if queries else []
        if self.words is not None and said.shape[1]:
            parts.append(self.words(said))
        return torch.cat(parts, 1)


class QFormer(nn.Module):
    """A `Connector`; without `dim_out` it is what BLIP-2's first stage trains.

    Text is {"ids", "mask"}, int64 [b, t], of BERT's vocabulary with [DEC] as its last row.

    Args:
        dim_in: width of the encoder's tokens.
        dim_out: width of the language model; None for no projection to it.
        queries: how many states, `width` wide, an image becomes.
        hidden: width inside the feed-forward layers.
        cross_every: queries see the image in layers 0, `cross_every`, and so on.
        text: BERT's tokenizer: a folder, a hub id, or a card's name.
        text_limit: most tokens of a text; of a question its end is kept, else its begin.
        words: rows of the vocabulary, [DEC] the last; `positions` those of places.
        instruct: the queries see the question.
        norm: normalise the encoder's tokens first (LAVIS' `ln_vision`).
        dropout: of BERT's layers and attention.
        frame: how an image becomes a square; BLIP-2 squashes it.
        init: `random`, or where a BERT, or a checkpoint of a Q-Former, lies: a file, a folder,
            a card's name, or a hub id.
    """

    words: nn.Embedding
    places: nn.Embedding

    def __init__(
        self,
        dim_in: int,
        dim_out: int | None,
        *,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        cross_every: int = 2,
        text: str = _BERT,
        text_limit: int = 32,
        words: int = 30_523,
        positions: int = 512,
        instruct: bool = False,
        norm: bool = True,
        dropout: float = 0.1,
        frame: Frame = "squash",
        init: str = _BERT,
    ) -> None:
        """Take the sizes; `start` reads or draws the weights.

        Raises:
            UsageError: a number outside its range.
        """
        super().__init__()
        sizes = {"queries": queries, "layers": layers, "heads": heads, "cross_every": cross_every}
        wrong = [f"{name} must be at least 1" for name, n in sizes.items() if n < 1]
        if heads > 0 and width % heads:
            wrong.append(f"width {width} must be a multiple of heads {heads}")
        if not 3 <= text_limit <= positions:  # noqa: PLR2004 - [CLS], a word, [SEP]
            wrong.append(f"text_limit must be between 3 and {positions} (positions)")
        if wrong:
            msg = f"qformer: {', '.join(wrong)}"
            raise UsageError(msg)
        self.reads, self.init, self.text_limit = instruct, init, text_limit
        self.frame: Frame = frame
        self.dec, self.has_text = words - 1, instruct or dim_out is None
        self.vocabulary = Vocabulary(text, text_limit, words, keep_end=instruct)
        self.norm = nn.LayerNorm(dim_in) if norm else nn.Identity()
        self.queries = nn.Parameter(torch.zeros(queries, width))
        if self.has_text:
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.enter, self.drop = nn.LayerNorm(width, eps=_EPS), nn.Dropout(dropout)
        # behind the last layer only queries go on, where there is a language model to go to
        read = layers if dim_out is None else layers - 1 if instruct else 0
        self.layers = nn.ModuleList(
            Layer(
                Attention(width, heads, width, dropout),
                Attention(width, heads, dim_in, dropout) if n % cross_every == 0 else None,
                [Feed(width, hidden, dropout) for _ in range(2 if n < read else 1)],
            )
            for n in range(layers)
        )
        self.project = nn.Identity() if dim_out is None else nn.Linear(width, dim_out)

    # --- as a connector --------------------------------------------------------------------

    def count(self, tokens: int) -> int:
        """See `Connector.count`: as many as there are queries."""
        del tokens
        return len(self.queries)

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """See `Connector.views`: the image in its frame."""
        return [framed(image, side, self.frame)]

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """See `Connector.tokens`: int64 [n, t] each, cut at the limit, padded to the longest."""
        return self.vocabulary(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, [CLS] and [SEP] included, before any is cut."""
        return self.vocabulary.count(texts)

    def forward(self, tokens: Tensor, of: Tensor, text: Text | None = None) -> Tensor:
        """See `Connector.forward`: tokens [m, t, d] of one view an image -> [m, queries, dim_out].

        Raises:
            UsageError: an instructed Q-Former is asked nothing.
        """
        del of  # an image has one view
        if self.reads and text is None:
            msg = "qformer: instruct is true, so every image needs a question's tokens"
            raise UsageError(msg)
        found: Tensor = self.project(self.look(tokens, text if self.reads else None))
        return found

    # --- who sees whom ---------------------------------------------------------------------

    def look(self, tokens: Tensor, text: Text | None = None) -> Tensor:
        """Return queries [m, queries, width] that see the image, and a question where given."""
        if text is None:
            return self._states(tokens, None, None)
        mask = self._present(text, len(self.queries))[:, None, None]
        return self._states(tokens, text["ids"], mask)[:, : len(self.queries)]

    def read(self, text: Text) -> Tensor:
        """Return the words [b, t, width] of texts alone."""
        return self._states(None, text["ids"], self._present(text, 0)[:, None, None])

    def together(self, tokens: Tensor, text: Text) -> Tensor:
        """Return queries [b, queries, width] that see image and text; the text sees them."""
        return self.look(tokens, text)

    def write(self, tokens: Tensor, text: Text) -> Tensor:
        """Return the words [b, t, width] of a text as it is written beside the image.

        A word sees the queries and the words before it; [DEC] stands for the first.
        """
        return self.look_and_write(tokens, text)[1]

    def look_and_write(self, tokens: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Return both `look(tokens)` and `write(tokens, text)` of one pass: queries see no word."""
        queries = len(self.queries)
        present = self._present(text, queries)
        size = present.shape[1]
        sees = torch.ones(size, size, dtype=torch.bool, device=present.device).tril()
        sees[:queries] = torch.arange(size, device=present.device) < queries
        ids = text["ids"].clone()
        ids[:, 0] = self.dec
        states = self._states(tokens, ids, sees & present[:, None, None])
        return states[:, :queries], states[:, queries:]

    def _present(self, text: Text, queries: int) -> Tensor:
        """Return bool [b, queries + t]: which states stand for something."""
        return nn.functional.pad(text["mask"].bool(), (queries, 0), value=True)

    def _states(self, tokens: Tensor | None, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the last states [b, q + t, width] of queries, words, or both."""
        parts, queries = [], 0
        image = self.queries  # nobody looks where there are no tokens
        if tokens is not None:
            image, queries = self.norm(tokens.to(self.queries.dtype)), len(self.queries)
            parts.append(self.queries.expand(len(tokens), -1, -1))
        if ids is not None:
            if not self.has_text:
                msg = "qformer: no text parts; instruct, or no dim_out, gives it some"
                raise UsageError(msg)
            parts.append(self.words(ids) + self.places.weight[: ids.shape[1]])
        states: Tensor = self.drop(self.enter(torch.cat(parts, 1)))
        for layer in self.layers:
            states = layer(states, queries, image, mask)
        return states

    @property
    def word_embeddings(self) -> Tensor:
        """The rows [words, width] of the vocabulary, which a head of words is tied to."""
        return self.words.weight

    # --- first weights ---------------------------------------------------------------------

    @torch.no_grad()
    def draw(self) -> None:
        """Draw all weights as BERT's are drawn, and wider where BERT-base is wider than this.

        A layer of a narrow network then passes on as much as one of BERT-base does.
        """
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
            elif isinstance(part, nn.Embedding):
                part.weight.normal_(std=_SPREAD)
            elif isinstance(part, nn.Linear):
                part.weight.normal_(std=_SPREAD * max(1, _BASE / part.in_features) ** 0.5)
                part.bias.zero_()
        self.queries.normal_(std=_SPREAD)

    def start(self) -> Mapping[str, Any]:
        """See `Connector.start`: what `init` has not is drawn."""
        self.draw()
        if self.init == "random":
            return {"kind": "qformer", "init": self.init}
        path = located(self.init)
        read = self._fitting(read_qformer(path))
        own = self.state_dict()
        bert = "queries" not in read
        drawn = [name for name in own if name not in read and _drawn(name, bert=bert)]
        if faults := shape_faults({name: own[name] for name in drawn} | read, self):
            msg = f"{path}: does not fit this Q-Former ({faults[0]}; {len(faults)} tensors in all)"
            raise DataError(msg)
        self.load_state_dict(read, strict=False)
        facts = {"kind": "qformer", "init": self.init, "init_sha256": sha256(path)}
        return facts | {"taken": len(read), "drawn": len(drawn)}

    def _fitting(self, read: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what was read without the parts left out here, and with those BERT lends.

        The queries' feed-forward layers begin as BERT's. The vocabulary grows by [DEC], and a
        projection to another language model stays out.
        """
        own = self.state_dict()
        if "queries" not in read:
            lent = {k.replace(".words.", ".queries."): x for k, x in read.items() if ".words." in k}
            read = {name: x.clone() for name, x in lent.items()} | read
        if "words.weight" in own and "words.weight" in read:
            rows = read["words.weight"]
            if len(rows) == self.dec:
                last = own["words.weight"][-1:].to(rows)
                read = read | {"words.weight": torch.cat([rows, last])}
        absent = ("words.", "places.", "norm.", "project.")
        gone = {n for n in read if n not in own and (n.startswith(absent) or ".words." in n)}
        way = "project.weight"
        if way in own and way in read and own[way].shape != read[way].shape:
            log.info(
                "qformer: %s projects to another language model; a new one is drawn", self.init
            )
            gone |= {way, "project.bias"}
        return {name: x for name, x in read.items() if name not in gone}


def _drawn(name: str, *, bert: bool) -> bool:
    """Tell whether a weight may be drawn because the file has none; BERT never saw an image."""
    mine = name.startswith(("queries", "norm.")) or ".cross." in name
    return name.startswith("project.") or (bert and mine)


class Vocabulary:
    """Texts in, BERT's tokens out; the tokenizer is read when it is first needed."""

    def __init__(self, source: str, limit: int, words: int, *, keep_end: bool) -> None:
        """Take where it is, the most tokens of a text, and the rows weights have for it."""
        self.source, self.limit, self.words, self.keep_end = source, limit, words, keep_end

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - tokenizers has no types
        from tokenizers import BertWordPieceTokenizer, Tokenizer  # noqa: PLC0415

        path = located(self.source)
        whole = path / "tokenizer.json" if path.is_dir() else path
        try:
            if whole.is_file():
                made = Tokenizer.from_file(str(whole))
            else:
                made = BertWordPieceTokenizer(str(path / "vocab.txt"), lowercase=True)
        except Exception as error:  # the reader of either has its own, undocumented errors
            msg = f"{path}: no BERT tokenizer here (tokenizer.json or vocab.txt)"
            raise DataError(msg) from error
        if made.get_vocab_size() >= self.words:
            msg = (
                f"{path}: {made.get_vocab_size()} words and [DEC] need as many rows; qformer's "
                f"`words` is {self.words}"
            )
            raise DataError(msg)
        made.no_truncation()
        made.no_padding()
        return made

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(texts))]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before it is cut."""
        return [len(ids) for ids in self._ids(texts)]

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `ids` and `mask`, int64 [n, t]; a cut text keeps [CLS] and [SEP]."""
        kept = [torch.tensor(self._cut(ids)) for ids in self._ids(texts)]
        mask = pad_sequence([torch.ones_like(ids) for ids in kept], batch_first=True)
        return {"ids": pad_sequence(kept, batch_first=True), "mask": mask}

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.limit:
            return ids
        inside = self.limit - 1
        return [ids[0], *ids[-inside:]] if self.keep_end else [*ids[:inside], ids[-1]]
