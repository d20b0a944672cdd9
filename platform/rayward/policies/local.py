"""A policy in this process: any causal language model that `transformers` loads, drawn from in batches with a key-value cache.

    --set sample.policy=transformers --set sample.policy_settings='{"model": "Qwen/Qwen3-0.6B", "max_new_tokens": 512}'

    token_BT    prompts and kept steps, padded on the left       logit_BV    what the model says of the next token
    mask_BT     1 where a token is one                           chance_BN   a number from [0, 1) for every token to come

A prefix that several requests of a batch share is read once; its cache is then given to each of them. A draw is made by its own
request's random numbers, seeded by its seed: so it depends on (prompt, kept steps, seed), and on what else is in the batch only as far as
float rounding can move a probability over such a number. Rows that have ended leave the batch.

Kept steps are put behind the opening of an answer just as they are. This is what `continue_final_message` of a chat template does, but
for templates that trim an answer or show past answers in another way than they open a new one: here the model reads what it would
have read, had it written these steps itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayward.errors import ModelError
from rayward.policies import Completion, Request, batches, written
from rayward.rendering import opened

CONTEXT = 8  # tokens before the new ones that are decoded with them, since a tokenizer may trim the start of a text


@dataclass(frozen=True)
class LocalSettings:
    """Which model, what is drawn, and how much at a time."""

    model: str  # folder or name on the hub
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # share of the likeliest tokens that is drawn from
    max_new_tokens: int = 1024  # most tokens of a completion
    stop: tuple[str, ...] = ()  # texts that end a completion, left out of it; one that is a token of its own ends it as that token
    batch_size: int = 16  # requests drawn at a time
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they were saved
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    trust_remote_code: bool = False  # run code that comes with the model

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0 and top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} and batch_size={self.batch_size} must be at least 1")


class LocalPolicy:
    """A causal language model and its tokenizer."""

    def __init__(self, settings: LocalSettings):
        self.settings, self.capacity = settings, settings.batch_size
        self.model, self.tokenizer = _load(settings)
        self.device = next(self.model.parameters()).device
        taken = inspect.signature(self.model.forward).parameters
        self._positions, self._last_logits = "position_ids" in taken, "logits_to_keep" in taken
        config = self.model.config.get_text_config()
        self.window: int | None = getattr(config, "max_position_embeddings", None)  # most tokens of prompt and answer
        self.stops, self.stop_texts = self._ends()

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        done = dict(self.stream(requests))
        return [done[place] for place in range(len(requests))]

    def stream(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion) as rows end, batch by batch."""
        for batch in batches(requests, self.settings.batch_size):
            try:
                yield from self._batch(batch)
            except torch.OutOfMemoryError as error:
                raise ModelError(f"{self.device} is full: {str(error).splitlines()[0]}", "take a smaller batch_size") from None

    def render(self, request: Request) -> list[int]:
        """The tokens of a prompt, the opening of an answer, and the kept steps."""
        return opened(self.tokenizer, request.prompt, request.kept)

    # ------------------------------------------------------------------------------------------------------ one batch

    def _batch(self, batch: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Completion]]:
        from jinja2.exceptions import TemplateError

        prefixes: dict[tuple[Any, ...], list[int] | str] = {}
        for _, request in batch:
            if (request.prompt, request.kept) not in prefixes:
                try:
                    tokens: list[int] | str = self.render(request)
                except (TemplateError, ValueError) as error:
                    tokens = f"chat template refuses: {error}"
                if self.window is not None and not isinstance(tokens, str) and len(tokens) >= self.window:
                    tokens = f"too long: {len(tokens):,} tokens of prompt >= {self.window:,}"
                prefixes[request.prompt, request.kept] = tokens
        rows: list[_Row] = []
        for place, request in batch:
            prefix = prefixes[request.prompt, request.kept]
            if isinstance(prefix, str):
                yield place, Completion((), "error", 0, error=prefix)
            else:
                room = self.settings.max_new_tokens if self.window is None else self.window - len(prefix)
                rows.append(_Row(place, request.seed, prefix, min(room, self.settings.max_new_tokens), []))
        if rows:
            yield from self._draw(rows)

    def _draw(self, rows: list[_Row]) -> Iterator[tuple[int, Completion]]:
        """Token by token, until every row has ended."""
        chance_BN = torch.stack([_chances(row.seed, self.settings.max_new_tokens) for row in rows])
        cache, logit_BV, mask_BT = self._read(rows)
        for n in range(self.settings.max_new_tokens):
            token_B = choose(logit_BV, chance_BN[:, n], self.settings.temperature, self.settings.top_p)
            live = []
            for at, (row, token) in enumerate(zip(rows, token_B.tolist(), strict=True)):
                row.new.append(token)
                completion = self._ended(row)
                if completion is None:
                    live.append(at)
                else:
                    yield row.place, completion
            if not live:
                return
            if len(live) < len(rows):
                rows, chance_BN = [rows[at] for at in live], chance_BN[live]
                keep_B = torch.tensor(live, device=self.device)
                cache.batch_select_indices(keep_B)
                token_B, mask_BT = token_B[keep_B], mask_BT[keep_B]
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            cache, logit_BV = self._forward(token_B[:, None], mask_BT, cache)

    def _read(self, rows: Sequence[_Row]) -> tuple[Any, Tensor, Tensor]:
        """Cache, logit_BV and mask_BT after the prefixes; each of them is read once."""
        unique: dict[tuple[int, ...], int] = {}
        of_row = [unique.setdefault(tuple(row.prefix), len(unique)) for row in rows]
        longest = max(map(len, unique))
        token_UT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in unique], device=self.device)
        mask_UT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique], device=self.device)
        cache, logit_UV = self._forward(token_UT, mask_UT, None)
        which_B = torch.tensor(of_row, device=self.device)
        cache.batch_select_indices(which_B)
        return cache, logit_UV[which_B], mask_UT[which_B]

    @torch.no_grad()
    def _forward(self, token_BT: Tensor, mask_BT: Tensor, cache: Any) -> tuple[Any, Tensor]:
        """The cache with these tokens in it, and logit_BV after the last of them."""
        more: dict[str, Any] = {}
        if self._positions:
            more["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -token_BT.shape[1] :]
        if self._last_logits:
            more["logits_to_keep"] = 1
        out = self.model(input_ids=token_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **more)
        return out.past_key_values, out.logits[:, -1].float()

    # ------------------------------------------------------------------------------------------------------ where it ends

    def _ends(self) -> tuple[set[int], list[str]]:
        """Tokens that end an answer, and texts that do."""
        given = [self.tokenizer.eos_token_id, getattr(self.model.generation_config, "eos_token_id", None)]
        stops = {token for one in given if one is not None for token in (one if isinstance(one, list) else [one])}
        texts = []
        for text in self.settings.stop:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(tokens) == 1 and tokens[0] in self.tokenizer.all_special_ids:
                stops.add(tokens[0])
            else:
                texts.append(text)
        return stops, texts

    def _ended(self, row: _Row) -> Completion | None:
        """The completion of a row that ends with its newest token."""
        if row.new[-1] in self.stops:
            return self._completion(row, self._text(row, row.new[:-1]), "stop")
        if any(stop in self._tail(row) for stop in self.stop_texts):
            text = self._text(row, row.new)
            found = [at for stop in self.stop_texts if (at := text.find(stop)) >= 0]
            if found:
                return self._completion(row, text[: min(found)], "stop")
        if len(row.new) == row.room:
            return self._completion(row, self._text(row, row.new), "length")
        return None

    def _completion(self, row: _Row, text: str, why: Literal["stop", "length"]) -> Completion:
        return Completion(written(text), why, len(row.new), len(row.prefix))

    def _text(self, row: _Row, tokens: Sequence[int]) -> str:
        """The text of new tokens, as it follows on the ones before them."""
        before = row.prefix[-CONTEXT:]
        context = self._decode(before)
        whole = self._decode([*before, *tokens])
        return whole[len(context) :] if whole.startswith(context) else self._decode(tokens)

    def _tail(self, row: _Row) -> str:
        """As many new tokens as the longest stop text can have, and some."""
        longest = max(len(text.encode()) for text in self.stop_texts)
        return self._decode(row.new[-longest - CONTEXT :])

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class _Row:
    """A draw under way."""

    place: int  # among the requests
    seed: int
    prefix: list[int]
    room: int  # most tokens that can follow
    new: list[int]


def choose(logit_BV: Tensor, chance_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """token_B: of every row the token in whose share of the probability its chance lies; the likeliest at temperature 0.

    Of a nucleus (arXiv 1904.09751) are the likeliest tokens that together have `top_p`; tokens as likely as the last of them are in.

    >>> logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(4, 3)
    >>> choose(logits, torch.tensor([0.1, 0.6, 0.79, 0.9], dtype=torch.float64), 1.0, 1.0).tolist()
    [0, 1, 1, 2]
    >>> choose(logits, torch.tensor([0.1, 0.6, 0.79, 0.9], dtype=torch.float64), 1.0, 0.6).tolist()
    [0, 0, 1, 1]
    """
    if temperature == 0:
        return logit_BV.argmax(-1)
    share_BV = torch.softmax(logit_BV.double() / temperature, -1)
    if top_p < 1:
        falling_BV = share_BV.sort(-1, descending=True).values
        inside_BV = falling_BV.cumsum(-1) - falling_BV < top_p
        least_B1 = falling_BV.masked_fill(~inside_BV, torch.inf).amin(-1, keepdim=True)
        share_BV = share_BV.masked_fill(share_BV < least_B1, 0.0)
    upto_BV = share_BV.cumsum(-1)
    wanted_B1 = chance_B.to(upto_BV.device)[:, None] * upto_BV[:, -1:]
    return torch.searchsorted(upto_BV, wanted_B1, right=True)[:, 0].clamp(max=logit_BV.shape[-1] - 1)


def _chances(seed: int, n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _load(settings: LocalSettings) -> tuple[Any, Any]:
    """Model and tokenizer, or ModelError."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"trust_remote_code": settings.trust_remote_code}
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=settings.dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model={settings.model} cannot be loaded on {device}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "give a folder with config.json, model.safetensors and a tokenizer, or a name on the hub, of a causal language model",
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"model={settings.model} lacks weights for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}",
            "a model that writes is needed: a reward model or an encoder has no output over words",
        )
    return model, tokenizer
