"""What a vision-language model costs here over the bare networks; one JSON line a part.

`step`: the trainer's loop over forward, backward and AdamW of the same modules: a small
Q-Former on tokens that lie ready, before a frozen LLaMA of 10 million weights.
`cache`: image tokens a second trained with the store's tokens, and with encoding each time.
`generate`: words a second of `HFLanguage.generate` over transformers' own, same model, same
prompt, same words out; `--model smollm2-135m` takes that one.
`memory`: bytes of gradients and of the optimiser that frozen and trained weights hold.
`real`: training steps of CLOVER's Q-Former before a frozen Vicuna-7B, all weights drawn, on
a CUDA GPU: tokens a second, memory, share of the GPU's peak (operations made again for
checkpointing count as well).

What is compared alternates; the ratios of neighbours count.

    python benchmarks/vlm.py [--parts step cache generate memory] [--rounds 3] [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pathcli.data.pairs import Pictures
from pathcli.encoders import build_encoder
from pathcli.encoders.augment import Augment
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.torchvision_guard import guard_torchvision
from pathcli.trainer import Loop, Work
from pathcli.types import Sample, silent
from pathcli.vlm.batches import Examples
from pathcli.vlm.chat import Chat
from pathcli.vlm.language import SHAPES, HFLanguage, Shape
from pathcli.vlm.model import NOT_LEARNT, VisionLanguage
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.sizes import GPUS
from pathcli.vlm.tokens import CacheSettings, TokenCache
from pathcli.vlm.towers import Views, ready

guard_torchvision()

Line = dict[str, Any]

LLAMA = Shape(8, 320, 864, 5, 5, 512, 10_245_440)
SMALL: dict[str, Any] = {"queries": 16, "width": 256, "layers": 4, "heads": 8, "hidden": 1024}
SMALL |= {"init": "random", "frame": "centre"}
TOKENS, DIM = 49, 1280  # lite0's and mini-clip's
MARKS = ("<unk>", "<s>", "</s>")
NO_GPU = "real: needs a CUDA GPU"
OTHER_WORDS = "generate: the two give different words, so their speed is not compared"


# --- models ------------------------------------------------------------------------------


class Drawn(HFLanguage):
    """A language model whose weights are drawn where they will be used: no file has them."""

    def __init__(self, *, place: str, **given: Any) -> None:  # noqa: ANN401 - HFLanguage's own
        """Draw on the device `place`."""
        super().__init__(**given)
        self.place = place

    def _read(self) -> Any:  # noqa: ANN401 - transformers' own
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        with torch.device(self.place):
            return AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.load))


def drawn(shape: Shape, folder: str, place: str, **given: Any) -> HFLanguage:  # noqa: ANN401
    """Return a LLaMA of a shape that speaks the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: PLC0415

    words = [*MARKS, *(f"w{i}" for i in range(shape.vocabulary - len(MARKS)))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=MARKS[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named = dict(zip(("unk_token", "bos_token", "eos_token"), MARKS, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=MARKS[0], **named)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.ffn}
    sizes |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    sizes |= {"num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    torch.manual_seed(0)
    language = Drawn(place=place, model=folder, **given)
    language.start()
    return language


def joined(encoder: Any, dim: int, language: HFLanguage, sizes: Line) -> VisionLanguage:  # noqa: ANN401
    """Return a model with a drawn Q-Former between encoder and language model."""
    connector = QFormer(dim, language.width, **sizes)
    connector.start()
    return VisionLanguage(encoder, connector, language)


def batch_of(rows: int, visual: int, words: int, vocabulary: int, seen: Line) -> Line:
    """Return a batch of one image a row, then words, of which the last third are learnt."""
    length = visual + words
    ids, at = torch.randint(3, vocabulary, (rows, length)), torch.arange(length)
    return seen | {
        "of": torch.arange(rows),
        "ids": ids,
        "mask": torch.ones(rows, length, dtype=torch.bool),
        "image": (at < visual).repeat(rows, 1),
        "labels": ids.masked_fill(at < length - words // 3, NOT_LEARNT),
    }


def small(given: argparse.Namespace, folder: str, **how: str) -> tuple[VisionLanguage, Line]:
    """Return the small model, and a batch of tokens and words for it, on the device."""
    language = drawn(LLAMA, folder, given.device, **how)
    model = joined(None, DIM, language, SMALL).to(given.device)
    seen = {"tokens": torch.randn(given.batch, TOKENS, DIM).half()}
    batch = batch_of(given.batch, SMALL["queries"], given.words, LLAMA.vocabulary, seen)
    return model, {name: part.to(given.device) for name, part in batch.items()}


# --- clocks ------------------------------------------------------------------------------


def now(device: str) -> float:
    """Return the time in seconds once all that was started is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: str) -> float:
    """Return how long a call takes, to the end of what it started."""
    start = now(device)
    call()
    return now(device) - start


def bare(module: VisionLanguage, batch: Line, steps: int, device: str) -> float:
    """Return the seconds of so many bare steps."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)

    start = now(device)
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    return now(device) - start


def loop_of(work: Work, folder: str, device: str, batch: int, precision: Any = "float32") -> Loop:  # noqa: ANN401
    """Return the trainer's loop over one epoch of the work."""
    settings = TrainSettings(epochs=1, batch=batch, precision=precision)
    return Loop(work, settings, Path(folder), device)


def looped(work: Work, batch: int, device: str) -> float:
    """Return the seconds of an epoch of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(work, folder, device, batch)
        return seconds(lambda: loop.run(silent), device)


def speeds(names: Sequence[str], rounds: Iterable[Sequence[float]], work: float) -> Line:
    """Return how much work a second each does, by its median round."""
    columns = zip(names, zip(*rounds, strict=True), strict=True)
    return {name: round(work / statistics.median(column), 1) for name, column in columns}


# --- parts -------------------------------------------------------------------------------


def step(given: argparse.Namespace) -> Iterable[Line]:
    """Time the trainer's loop and the bare step of one model in turns."""
    with tempfile.TemporaryDirectory() as folder:
        module, batch = small(given, folder)
    work = Work(module, range(given.batch * given.steps), collate=lambda *_: batch)
    place = given.device
    bare(module, batch, 2, place)
    rounds = [
        (bare(module, batch, given.steps, place), looped(work, given.batch, place))
        for _ in range(given.rounds)
    ]
    yield {
        "rows": given.batch,
        "tokens_of_a_row": batch["ids"].shape[1],
        "steps": given.steps,
        "tokens_per_second": speeds(("bare", "loop"), rounds, given.steps * batch["ids"].numel()),
        "loop_over_bare": [round(b / o, 3) for b, o in rounds],
    }


def pictures(folder: Path, count: int) -> list[Sample]:
    """Return samples of smooth noise in JPEGs of 224 px, each with a caption of ten words."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        coarse = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        path = str(folder / f"{number}.jpg")
        cv2.imwrite(path, cv2.resize(coarse, (224, 224), interpolation=cv2.INTER_CUBIC))
        words = " ".join(f"w{word}" for word in rng.integers(0, 500, 10))
        found.append(Sample(path, (path,), words))
    return found


def cache(given: argparse.Namespace) -> Iterable[Line]:
    """Time an epoch with tokens of the store, and one that encodes, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        samples, place = pictures(Path(folder), given.batch * given.steps), given.device
        encoder: Any = build_encoder(given.encoder, tokens=True)
        settings, refs = CacheSettings(tokens="float16"), [s.images[0] for s in samples]
        stored = TokenCache(refs, encoder, Store(f"{folder}/store"), settings, place)
        filling = seconds(lambda: stored.fill(silent), place)
        tokens, dim = ready(encoder, place).row_shape
        language = drawn(LLAMA, folder, place)
        module = joined(encoder, dim, language, SMALL).to(place)
        connector: Any = module.connector
        how = (Chat(template="plain"), connector, language, connector.count(tokens))
        still = (Pictures(samples), connector, Augment(), encoder.input_px)
        views = [Views(*still, kept) for kept in (stored, None)]
        works = [Work(module, samples, collate=Examples(each, *how)) for each in views]
        rounds = [[looped(w, given.batch, place) for w in works] for _ in range(given.rounds)]
    yield {
        "encoder": given.encoder,
        "images": len(samples),
        "tokens_of_an_image": tokens,
        "mb_of_an_image": round(stored.bytes(1) / 1e6, 3),
        "fill_seconds": round(filling, 2),
        "image_tokens_per_second": speeds(("stored", "encoded"), rounds, len(samples) * tokens),
        "stored_over_encoded": [round(e / s, 2) for s, e in rounds],
    }


def generate(given: argparse.Namespace) -> Iterable[Line]:
    """Time greedy generation here and by transformers in turns; the words must be the same."""
    with tempfile.TemporaryDirectory() as folder:
        if given.model:
            language = HFLanguage(model=given.model)
            language.start()
        else:
            language = drawn(LLAMA, folder, given.device)
        ends, pad = sorted(language._ends), language.tokenizer.pad_token_id  # noqa: SLF001
    language.to(given.device).eval()
    shape, n, place = (given.rows, given.words), given.new, given.device
    torch.manual_seed(0)
    ids = torch.randint(3, language.config.vocab_size, shape, device=place)
    mask = torch.ones(shape, dtype=torch.bool, device=place)
    how = {"max_new_tokens": n, "min_new_tokens": n}

    def ours() -> Any:  # noqa: ANN401 - lists of words
        return language.generate(language.embed(ids), mask, **how)

    def theirs() -> Any:  # noqa: ANN401 - a tensor
        said = {"eos_token_id": ends, "pad_token_id": pad, "do_sample": False}
        return language.network.generate(ids, attention_mask=mask.long(), **how, **said)

    if ours() != theirs()[:, given.words :].tolist():
        raise SystemExit(OTHER_WORDS)
    rounds = [(seconds(theirs, place), seconds(ours, place)) for _ in range(given.rounds)]
    yield {
        "model": given.model or "llama of 10 M weights, drawn",
        "rows": given.rows,
        "prompt": given.words,
        "new": n,
        "tokens_per_second": speeds(("transformers", "ours"), rounds, given.rows * n),
        "ours_over_transformers": [round(t / o, 3) for t, o in rounds],
    }


def memory(given: argparse.Namespace) -> Iterable[Line]:
    """Look what weights hold after two steps of the trainer and one more backward pass."""
    encoder: Any = build_encoder(given.encoder, tokens=True)
    ready(encoder, given.device)
    for tune in ("frozen", "lora", "full"):
        with tempfile.TemporaryDirectory() as folder:
            module, batch = small(given, folder, tune=tune)
            module.encoder = encoder
            shape = (len(batch.pop("tokens")), encoder.input_px, encoder.input_px, 3)
            batch["views"] = torch.zeros(shape, dtype=torch.uint8, device=given.device)
            work = Work(module, range(2 * given.batch), collate=lambda *_, b=batch: b)
            loop = loop_of(work, folder, given.device, given.batch)
            loop.run(silent)
        module.loss(batch).backward()
        parts = {"encoder": networks_of(encoder)}
        parts |= {"connector": [module.connector], "language": [module.language]}
        yield {"tune": tune} | {
            name: {
                kind: held_by([p for p in weights if p.requires_grad == (kind == "trained")], loop)
                for kind in ("frozen", "trained")
            }
            for name, networks in parts.items()
            if (weights := [p for network in networks for p in network.parameters()])
        }


def networks_of(encoder: object) -> list[torch.nn.Module]:
    """Return the networks an encoder keeps, by itself or within what it calls."""
    own = list(vars(encoder).values())
    called = [x for part in own if hasattr(part, "__dict__") for x in vars(part).values()]
    return [x for x in [*own, *called] if isinstance(x, torch.nn.Module)]


def held_by(weights: list[torch.nn.Parameter], loop: Loop) -> dict[str, int]:
    """Return the bytes of weights, of their gradients, and of what the optimiser keeps of them."""
    state: Any = loop.optimizer.state
    kept = [x for p in weights if p in state for x in state[p].values() if torch.is_tensor(x)]
    gradients = [p.grad for p in weights if p.grad is not None]
    held = {"weights": weights, "gradients": gradients, "optimizer": kept}
    return {name: sum(x.nbytes for x in some) for name, some in held.items()}


# --- on a GPU ----------------------------------------------------------------------------


def real(given: argparse.Namespace) -> Iterable[Line]:
    """Refuse to be without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    yield real_size(SHAPES["vicuna-7b"], "cuda", given)


def real_size(shape: Shape, place: str, given: argparse.Namespace) -> Line:
    """Train a Q-Former of BERT-base's size, instructed, before a frozen language model."""
    sizes = {"init": "random", "instruct": True, "text_limit": 128}
    with tempfile.TemporaryDirectory() as folder:
        language = drawn(shape, folder, place, load=given.load, checkpointing=given.checkpointing)
        module = joined(None, 1408, language, sizes).to(place)
        text = torch.randint(1000, 30_000, (given.batch, 64), device=place)
        seen = {"tokens": torch.randn(given.batch, 257, 1408).half()}
        batch = batch_of(given.batch, 32, given.words, shape.vocabulary, seen)
        batch = {name: part.to(place) for name, part in batch.items()}
        batch["text"] = {"ids": text, "mask": torch.ones_like(text)}
        count = FlopCounterMode(display=False)
        with count, torch.autocast(place, torch.bfloat16):
            module.loss(batch).backward()
        module.zero_grad()
        if place == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [now(place)]
        work = Work(module, range(given.batch * given.steps), collate=lambda *_: batch)
        loop = loop_of(work, folder, place, given.batch, "bfloat16")
        loop.run(lambda *_: times.append(now(place)))
    took = statistics.median(b - a for a, b in list(pairwise(times))[given.steps // 4 :])
    name = torch.cuda.get_device_name() if place == "cuda" else place
    peaks = [gpu.tflops for key, gpu in GPUS.items() if key.partition("-")[0] in name.lower()]
    memory = torch.cuda.max_memory_allocated() / 2**30 if place == "cuda" else None
    flops = count.get_total_flops() / 1e12
    return {
        "gpu": name,
        "rows": given.batch,
        "tokens_of_a_row": 32 + given.words,
        "load": given.load,
        "checkpointing": given.checkpointing,
        "step_seconds": round(took, 4),
        "tokens_per_second": round(given.batch * (32 + given.words) / took),
        "peak_gib": memory and round(memory, 1),
        "tflop_of_a_step": round(flops, 3),
        "share_of_peak": round(flops / took / peaks[0], 3) if peaks else None,
    }


PARTS: Line = {part.__name__: part for part in (step, cache, generate, memory, real)}


def main() -> None:
    """Measure what is asked for, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:-1])
    numbers = {"rounds": 3, "steps": 20, "batch": 8, "words": 64, "new": 64, "rows": 1}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="lite0")
    parser.add_argument("--model", default="", help="of `generate`: a card's name or a folder")
    parser.add_argument("--load", default="bfloat16", help="of the frozen weights of `real`")
    parser.add_argument("--checkpointing", action="store_true", help="of `real`")
    given = parser.parse_args()
    known = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    known |= {"machine": platform.machine(), "device": given.device}
    for part in given.parts:
        for line in PARTS[part](given):
            print(json.dumps({"benchmark": "vlm", "part": part} | known | line), flush=True)


if __name__ == "__main__":
    main()
