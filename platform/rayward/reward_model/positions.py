"""How long a sequence a body can read: what is longer is cut or left out, and no index error ends a training in its middle.

    learned      a row of a table for every position (BERT, GPT-2, OPT): there is none beyond its end
    tabulated    sines made once, up to a length (GPT-J): the same
    computed     rotary or relative positions: any, but none beyond what it was trained on have been seen, which is a line of warning

>>> from transformers import GPT2Config, GPT2ForSequenceClassification
>>> body = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=64))
>>> readable(body, 2048), readable(body, 32)
(64, 32)
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions", "embeddings_position")  # what classes call them
SCALED = ("linear", "dynamic", "yarn", "longrope")  # kinds of rotary scaling that reach `factor` times as far


def readable(classifier: Any, max_length: int) -> int:
    """The most tokens of a sequence, up to `max_length`, that a body has positions for."""
    table = table_length(classifier)
    return max_length if table is None else min(max_length, table)


def tell_length(classifier: Any, max_length: int) -> None:
    """Say on stderr where a body reads no further than `max_length`, or was not made to."""
    table, trained = table_length(classifier), trained_length(classifier)
    if table is not None and max_length > table:
        print(
            f"render.max_length is {table:,} here and not {max_length:,}: this model has no positions beyond; "
            "longer examples are left out, or cut with --set render.too_long=cut",
            file=sys.stderr,
        )
    elif table is None and trained is not None and max_length > trained:
        print(
            f"render.max_length={max_length:,} is more than the {trained:,} tokens this model was made for: it has not seen such places",
            file=sys.stderr,
        )


def table_length(classifier: Any) -> int | None:
    """How many tokens a body has a table of positions for; None where it computes them.

    Some begin to count behind the padding token (RoBERTa), or at an offset of their own (OPT): those rows are no positions.
    """
    found = []
    for name, module in classifier.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            before = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            found.append(module.num_embeddings - before)
        fixed = getattr(module, "embed_positions", None)  # GPT-J and CodeGen: one in every layer, no module
        if isinstance(fixed, Tensor):
            found.append(fixed.shape[0])
    return min(found) if found else None


def trained_length(classifier: Any) -> int | None:
    """How many tokens the config of a body speaks of, rotary scaling counted; None where it does not say."""
    config = classifier.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    if not isinstance(said, int) or said <= 0:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [scaling, *(kind for kind in scaling.values() if isinstance(kind, dict))]  # one, or one for each kind of layer
    reach = [said]
    for kind in kinds:
        if kind.get("rope_type") in SCALED and kind.get("factor"):
            reach.append(int((kind.get("original_max_position_embeddings") or said) * kind["factor"]))
    return max(reach)
