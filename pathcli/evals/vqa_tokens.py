"""A language model's name in, the rule that counts its tokens out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pathcli.metrics.vqa import language_recall

if TYPE_CHECKING:
    from pathcli.metrics.vqa import Rule


def token_rules(model: str | None) -> tuple[Rule, ...]:
    """Return PA-LLaVA's recall over the tokens of a model as recipes name it; nothing for None.

    Raises:
        UsageError: the name is another download's.
        ResourceError: it is not here and cannot be had.
        DataError: it has no tokenizer that can be read.
    """
    if model is None:
        return ()
    from pathcli.vlm.language import HFLanguage  # noqa: PLC0415 - torch and transformers

    tokenizer = HFLanguage(model=model).tokenizer

    def cut(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return (language_recall(cut, model),)
