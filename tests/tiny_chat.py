"""Tokenizers as Llama 3's and SmolLM2's, and the chat templates their authors give them."""

from __future__ import annotations

from typing import Any

from pathcli.types import Sample

# The formats as the models' own authors write them, by their cards; words are ours.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
MARKS += ["<|eot_id|>", "<|im_start|>", "<|im_end|>"]
TALK = Sample("talk", (), "No, it is normal.", ("Is it a tumour?", "Näin on 细胞 ok.", "Sure?"))


def byte_bpe(bos: str | None, end: str, jinja: str) -> Any:
    """A tokenizer of bytes as Llama 3's and SmolLM2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(
        ["Is it a tumour? No, it is normal.\n\nSure? system user"] * 9, trainer
    )
    if bos:
        mark = (bos, made.token_to_id(bos))
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[mark])
    bos = bos or "<|im_start|>"  # SmolLM2 has it there, and begins no text with it
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=end)
    fast.add_special_tokens({"additional_special_tokens": MARKS})
    fast.chat_template = jinja
    return fast
