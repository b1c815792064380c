"""Language models that train in a second, as folders in transformers' format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pathcli.torchvision_guard import guard_torchvision

guard_torchvision()

WIDTH = 32
_CORPUS = [
    "USER: What do you see in this picture? ASSISTANT: This is tissue of the colon.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "Is there a tumour here? Answer yes or no. yes, no, normal, tumour, benign, malignant",
    "red green blue purple pink grey round small large cells nuclei glands stroma lymphocytes",
    "Describe the image. The picture shows many cells with large nuclei.",
]


def tokenizer(folder: Path, first: list[str], bos: str | None, end: str, pad: str) -> Any:
    """Save a tokenizer as LLaMA's works: pieces that begin with a space, bytes for the rest.

    `first` are the special tokens with the first ids; `bos` begins a text, or `end` ends it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt = Tokenizer(models.BPE(byte_fallback=True))
    learnt.normalizer = spaces
    added = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=added, show_progress=False)
    learnt.train_from_iterator([word for line in _CORPUS for word in line.split()], trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    bytes_too = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    made = Tokenizer(models.BPE(learnt.get_vocab(), merges, **bytes_too))
    made.normalizer = spaces
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    ids = made.get_vocab()
    single = f"{bos} $A" if bos else f"$A {end}"
    pair = f"{bos} $A {bos} $B" if bos else f"$A {end} $B {end}"
    edge = bos or end
    made.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(edge, ids[edge])]
    )
    specials = {"eos_token": end, "unk_token": "<unk>", "pad_token": pad}
    if bos:
        specials["bos_token"] = bos
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **specials)
    fast.save_pretrained(folder)
    return fast


def _save(model_class: Any, config: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)


def tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Make a LLaMA of two layers with its tokenizer: <unk> 0 (also the padding), <s> 1, </s> 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tokenizer(folder, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "<unk>")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    _save(LlamaForCausalLM, config, folder, seed)
    return folder


def tiny_t5(folder: Path, *, seed: int = 0) -> Path:
    """Make a FLAN-T5 of two layers: <pad> 0, </s> 1, <unk> 2; dropout 0.1, a head of its own."""
    from transformers import T5Config, T5ForConditionalGeneration

    fast = tokenizer(folder, ["<pad>", "</s>", "<unk>"], None, "</s>", "<pad>")
    config = T5Config(
        vocab_size=len(fast),
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        initializer_factor=2.0,
        decoder_start_token_id=0,
    )
    _save(T5ForConditionalGeneration, config, folder, seed)
    file = folder / "model.safetensors"
    state = load_file(file)
    if "lm_head.weight" not in state:  # transformers 5 ties it; FLAN's is apart
        draws = torch.Generator().manual_seed(seed)
        state["lm_head.weight"] = torch.randn(state["shared.weight"].shape, generator=draws)
        save_file(state, file, {"format": "pt"})
    return folder
