"""Image-text-to-text models of transformers, each in its own format and made in a moment."""

from __future__ import annotations

from pathlib import Path

from tiny_chat import byte_bpe
from tiny_language import tokenizer as llama_tokenizer
from tiny_plip import WORDS
from tiny_qformer import QUERIES, THEIRS, shaken

from pathcli.torchvision_guard import guard_torchvision

guard_torchvision()

SIDE = 28
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
WORDS_OF = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
WORDS_OF |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}

# As the models' own authors have them, without what these tests do not use.
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content if c.type == 'image' "
    "%}{{ '<image>\n' }}{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else "
    "m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>{% else %}"
    "{{ c.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def llava(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = llama_tokenizer(folder, ["<unk>", "<s>", "</s>", "<image>"], "<s>", "</s>", "<unk>")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    crop = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    ).save_pretrained(folder)
    text = WORDS_OF | {"model_type": "llama", "vocab_size": len(words), "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=TOWER | {"model_type": "clip_vision_model"},
        text_config=text | {"bos_token_id": 1, "pad_token_id": 0},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    shaken(LlavaForConditionalGeneration(config)).save_pretrained(folder)


def qwen(folder: Path) -> None:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = byte_bpe(None, "<|im_end|>", QWEN)
    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    words.add_tokens(marks, special_tokens=True)
    words.pad_token = "<|end_of_text|>"  # noqa: S105 - a token
    start, image, end, video = words.convert_tokens_to_ids(marks)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84),
        words,
        Qwen2VLVideoProcessor(),
        chat_template=QWEN,
    ).save_pretrained(folder)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = WORDS_OF | {"vocab_size": len(words), "rope_parameters": rope, "rope_scaling": rope}
    config = Qwen2VLConfig(
        text_config=text | {"eos_token_id": words.eos_token_id, "bos_token_id": None},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    shaken(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)


def gemma(folder: Path) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        GenerationConfig,
    )

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    marks |= {"image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    first = ["<unk>", "<bos>", "<eos>", *marks.values(), *turns]
    llama_tokenizer(folder, first, "<bos>", "<eos>", "<unk>")
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=marks)
    words.add_tokens(turns, special_tokens=True)
    size = {"height": SIDE, "width": SIDE}
    Gemma3Processor(
        Gemma3ImageProcessor(size=size), words, chat_template=GEMMA, image_seq_length=1
    ).save_pretrained(folder)
    ids = dict(zip(first, words.convert_tokens_to_ids(first), strict=True))
    text = {"vocab_size": len(words), "head_dim": 8, "sliding_window": 64, "eos_token_id": 2}
    config = Gemma3Config(
        text_config=WORDS_OF | text | {"bos_token_id": 1, "query_pre_attn_scalar": 8},
        vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=1,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    model = shaken(Gemma3ForConditionalGeneration(config))
    ends = [2, ids["<end_of_turn>"]]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(folder)


def instructblip(folder: Path) -> None:
    from transformers import (
        BertTokenizerFast,
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    words = llama_tokenizer(folder, ["<unk>", "<s>", "</s>", "<image>"], "<s>", "</s>", "<unk>")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    asks = BertTokenizerFast(str(folder / "vocab.txt"))
    (folder / "vocab.txt").unlink()
    image = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    made = InstructBlipProcessor(image, words, asks, num_query_tokens=QUERIES)
    made.save_pretrained(folder)
    text = WORDS_OF | {"model_type": "llama", "vocab_size": len(words), "eos_token_id": 2}
    reader = THEIRS | {"encoder_hidden_size": 32, "vocab_size": len(asks)}
    config = InstructBlipConfig(
        vision_config=TOWER,
        qformer_config=reader | {"max_position_embeddings": 64},
        text_config=text | {"bos_token_id": 1, "pad_token_id": 0},
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    shaken(InstructBlipForConditionalGeneration(config)).save_pretrained(folder)


def blip2(folder: Path) -> None:
    """Make BLIP-2 on a FLAN-T5, which has a head of its own."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    words = llama_tokenizer(folder, ["<pad>", "</s>", "<unk>", "<image>"], None, "</s>", "<pad>")
    image = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    Blip2Processor(image, words, num_query_tokens=QUERIES).save_pretrained(folder)
    text = {"model_type": "t5", "vocab_size": len(words), "d_model": 32, "d_kv": 8, "d_ff": 48}
    text |= {"num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    text |= {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = Blip2Config(
        vision_config=TOWER,
        qformer_config=THEIRS | {"encoder_hidden_size": 32},
        text_config=text | {"tie_word_embeddings": False},
        num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    shaken(Blip2ForConditionalGeneration(config)).save_pretrained(folder)


MAKERS = {"llava": llava, "qwen": qwen, "gemma": gemma, "instructblip": instructblip}
MAKERS["blip2"] = blip2
