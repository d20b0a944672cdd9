"""A small model from scratch (`--model tiny`): a Qwen3 decoder, and a tokenizer of the words that the examples use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rayward import heads
from rayward.records import Example
from rayward.reward_model.head_choice import asked_reading, attach_output_layer, fresh_head
from rayward.reward_model.loading import Loaded
from rayward.reward_model.model import RewardModel
from rayward.reward_model.overall import attach_overall
from rayward.reward_model.settings import ModelSettings
from rayward.vocabulary import TIED

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_model(examples: Iterable[Example], settings: ModelSettings, max_length: int, seed: int, attributes: Sequence[str] = ()) -> Loaded:
    """A small Qwen3 decoder from scratch, and a word-level tokenizer of the words that the examples use most."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = word_tokenizer(examples, settings.words, settings.head_tokens.split())
    reading = asked_reading("tiny", replace(settings, new_head=True), {}, attributes)
    if reading.tied or settings.language:
        ids = heads.token_ids(tokenizer, settings.head_tokens, reading) if reading.tied else []
        reading = replace(reading, tokens=tuple(ids), output_layer=TIED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=settings.width // 4,
        max_position_embeddings=max_length,
        num_labels=len(reading.labels),
        tie_word_embeddings=bool(reading.output_layer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    classifier = Qwen3ForSequenceClassification(config)
    fresh_head(classifier, reading, settings.pooling)
    attach_output_layer("tiny", classifier, settings, reading)
    attach_overall("tiny", classifier, reading)
    return Loaded(RewardModel(classifier, settings.pooling, max_length, reading, attend_by=settings.attention), tokenizer, {})


def word_tokenizer(examples: Iterable[Example], most: int, besides: Sequence[str] = ()) -> Any:
    """One token per word or run of punctuation, the most frequent words first; roles and ends of turns are tokens of their own.

    `besides` are words that are tokens whatever the examples hold.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for example in examples:
        for text in (*(m.content for m in example.prompt), *("".join(a) for a in example.answers)):
            counts.update(word for word, _ in split.pre_tokenize_str(text))
    special = ["<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    turns = special[3:]
    special += [word for word in besides if word not in special]
    words = [w for w, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if w not in special][: max(0, most - len(special))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(special + words)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=turns,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
