"""Batched greedy generation: the tokens of `model.generate`, without what makes it slow over a list of prompts.

transformers' dynamic cache is copied whole at every step, and a batch runs until its last row ends. Here the keys and
values of all rows lie in one block of columns, allocated once. Every row's tokens end at the same column, the newest
one, and run from there to the left without a gap, so that a difference of columns is a difference of positions and an
ordinary padding mask is right in full and in sliding-window layers. A row that ends leaves at once, and a waiting
prompt takes its place: its tokens are computed on the columns left of the newest one. Prompts are taken longest first,
so that these columns are always there. What all prompts begin with is computed once.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from spath_eval.models import rescaled_beyond

log = logging.getLogger(__name__)

SHORTEST_PREFIX = 32
"""Tokens that all prompts must begin with for them to be computed once."""
SPARE_COLUMNS = 128
"""Steps between two moves of the whole block to its left end, at least, where prompts are waiting."""

NEUTRAL: Mapping[str, Collection[Any]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "guidance_scale": (1.0,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "return_dict_in_generate": (False,),
}
"""Settings of `generate` with the values that leave greedy decoding as it is; another value changes it, or may."""
IRRELEVANT = frozenset(
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty early_stopping use_cache "
    "cache_implementation cache_config max_cache_len max_length bos_token_id eos_token_id pad_token_id "
    "decoder_start_token_id num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
    "assistant_lookbehind target_lookbehind is_assistant low_memory compile_config disable_compile "
    "continuous_batching_config prefill_chunk_size transformers_version _from_model_config".split()
)
"""What a model's generation configuration may hold without a bearing on the tokens that greedy decoding gives."""
SAMPLING = frozenset("do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split())
"""The settings of a task that greedy decoding ignores, `do_sample` aside."""


def why_not(model: PreTrainedModel, settings: Mapping[str, Any]) -> str | None:
    """Why `generate` would not give what `model.generate` gives under these settings; none where it would.

    `settings` are a task's `generation_kwargs`, normalised by lm-eval, without `until` and `max_gen_toks`. The model's
    own generation configuration counts as well.
    """
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if settings.get("do_sample"):
        return "the task samples"
    for name, value in settings.items():
        if name not in SAMPLING and value is not None and value not in NEUTRAL.get(name, ()):
            return f"the task sets {name}={value!r}"
    for name, value in model.generation_config.to_diff_dict().items():
        if name not in IRRELEVANT | {"do_sample"} and value is not None and value not in NEUTRAL.get(name, ()):
            return f"the model's generation configuration sets {name}={value!r}"
    return None


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    max_rows: int,
    token_budget: int,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations, as they end: the index of a prompt, and the tokens that follow it.

    A row ends with its `max_new_tokens`-th token, with an EOS token of the model's generation configuration, or with
    the token that completes a string of `until` in the decoded text, special tokens included. The caller cuts the text
    there. That is where lm-eval stops a batch of one row; in a larger batch it lets the row run on, which changes the
    cut text only where a stop string is a special token or overlaps with another.

    `max_rows` rows at most run at once, over as many columns as the longest prompt and `max_new_tokens` need together,
    and `SPARE_COLUMNS` more where prompts have to wait. `token_budget` bounds the tokens of one forward over prompts,
    padding included, unless a single prompt is longer. No prompt may be empty. What ran out of memory
    (`torch.OutOfMemoryError`) can be asked for again with less of both, without the prompts that have ended.
    """
    if not prompts:
        return
    stop = _Stop.of(model, tokenizer, until, max_new_tokens)
    longest = max(map(len, prompts)) + max_new_tokens
    reason = _needs_own_cache(model, longest)
    if reason is None:
        yield from _Decoding(model, stop, prompts, max_rows, token_budget).run()
    else:
        _warn_once(f"{type(model).__name__} generates in padded batches, which is slower: {reason}")
        yield from _in_padded_batches(model, tokenizer, stop, prompts, max_rows, token_budget)


@dataclass(frozen=True)
class _Stop:
    """When a row ends."""

    tokenizer: PreTrainedTokenizerBase
    strings: Sequence[str]
    eos: Collection[int]
    max_new_tokens: int
    tail: int
    """Tokens at a row's end that can hold any of the strings; one that is missed only costs time."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], max_new_tokens: int
    ) -> _Stop:
        eos = model.generation_config.eos_token_id
        lengths = [len(tokenizer.encode(string, add_special_tokens=False)) for string in strings]
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return cls(tokenizer, strings, frozenset(ids), max_new_tokens, max(lengths, default=0) + 2)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a row ends with the last of the `tokens` it has generated."""
        if len(tokens) >= self.max_new_tokens or tokens[-1] in self.eos:
            return True
        return self._completed(tokens[-self.tail :]) and self._completed(tokens)

    def _completed(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(tokens)) if self.strings else ""
        return any(string in text for string in self.strings)


@dataclass
class _Span:
    """The part of the block that a forward sees and extends."""

    rows: slice
    start: int
    """Column of the oldest token of any row."""
    stop: int
    """Column of the first new token."""


class _Columns(CacheLayerMixin):
    """Keys and values of a layer: `[rows, heads, columns, head size]`, written in place."""

    def __init__(self, span: _Span, rows: int, columns: int, window: int | None) -> None:
        super().__init__()
        self.span, self.rows, self.columns, self.window = span, rows, columns, window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros, because what a mask hides must still be finite
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        new = key_states.shape[2]
        rows, stop = self.span.rows, self.span.stop + new
        self.keys[rows, :, self.span.stop : stop] = key_states
        self.values[rows, :, self.span.stop : stop] = value_states
        first = stop - self.get_mask_sizes(new)[0]
        return self.keys[rows, :, first:stop], self.values[rows, :, first:stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length() + query_length
        seen = length if self.window is None else min(length, self.window - 1 + query_length)
        return seen, length - seen

    def get_seq_length(self) -> int:
        return self.span.stop - self.span.start

    def get_max_length(self) -> int:
        return -1


class _ColumnCache(Cache):
    """The block of all layers, and the span of it that the next forward is about."""

    def __init__(self, config: PreTrainedConfig, rows: int, columns: int) -> None:
        self.span = _Span(slice(0, rows), 0, 0)
        layers = DynamicCache(config=config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        super().__init__(
            layers=[
                layer if isinstance(layer, DummyLayer) else _Columns(self.span, rows, columns, window)
                for layer, window in zip(layers, windows, strict=True)
            ]
        )

    @property
    def blocks(self) -> list[Tensor]:
        """The keys and values of all layers that have some."""
        layers = [layer for layer in self.layers if isinstance(layer, _Columns)]
        return [block for layer in layers for block in (layer.keys, layer.values) if block is not None]

    def see(self, rows: slice, start: int, stop: int) -> None:
        """The next forward is about `rows`, whose tokens lie between these columns."""
        self.span.rows, self.span.start, self.span.stop = rows, start, stop

    def move_rows(self, moves: Mapping[int, int], start: int, stop: int) -> None:
        """Copies rows, source to target, between two columns."""
        for block in self.blocks:
            for source, target in moves.items():
                block[target, :, start:stop] = block[source, :, start:stop]

    def move_columns(self, rows: int, start: int, stop: int) -> None:
        """Moves what lies between two columns of the first rows to the left end."""
        for block in self.blocks:
            block[:rows, :, : stop - start] = block[:rows, :, start:stop].clone()


@dataclass
class _Row:
    """A prompt that is being continued."""

    prompt: int
    """Its index."""
    start: int
    """Column of its first token."""
    tokens: list[int] = field(default_factory=list)
    """What follows it so far."""


class _Decoding:
    """The rows that run, and the prompts that wait. Rows fill the block from above, without a gap."""

    def __init__(
        self, model: PreTrainedModel, stop: _Stop, prompts: Sequence[Sequence[int]], max_rows: int, token_budget: int
    ) -> None:
        self.model, self.stop, self.prompts, self.token_budget = model, stop, prompts, token_budget
        self.waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        self.rows: list[_Row] = []
        self.capacity = min(max_rows, len(prompts))
        self.columns = max(map(len, prompts)) + stop.max_new_tokens
        if len(prompts) > self.capacity:
            self.columns += SPARE_COLUMNS
        self.newest = 0
        """The column after the newest tokens."""
        self.cache = _ColumnCache(model.config.get_text_config(decoder=True), self.capacity, self.columns)
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.head: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}
        self.shared = 0
        """Tokens that all prompts begin with, where they were computed once."""
        self.prefix: list[Tensor] = []
        """Their keys and values, `[heads, shared, head size]`."""

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """All prompts and their continuations, in the order in which these end."""
        self._share_prefix()
        patience = max(1, self.capacity // 8)  # several prompts in one forward cost less than as many forwards
        while self.waiting or self.rows:
            if self.waiting and (not self.rows or self.capacity - len(self.rows) >= patience):
                while self.waiting and len(self.rows) < self.capacity:
                    self._admit()
            else:
                self._step()
            yield from self._dismiss()

    def _share_prefix(self) -> None:
        """Computes what all prompts begin with, if it is long enough; of each, a token at least is left."""
        columns = zip(*self.prompts, strict=False)
        alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        shared = min(alike, min(map(len, self.prompts)) - 1)
        if len(self.prompts) > 1 and shared >= SHORTEST_PREFIX:
            self.cache.see(slice(0, 1), 0, 0)
            self._forward([self.prompts[0][:shared]], [0])
            self.prefix = [block[0, :, :shared].clone() for block in self.cache.blocks]
            self.shared = shared

    def _admit(self) -> None:
        """Computes the next waiting prompts, on free rows, left of the newest column."""
        longest = len(self.prompts[self.waiting[0]])
        width = longest - self.shared
        count = min(len(self.waiting), self.capacity - len(self.rows), max(1, self.token_budget // width))
        batch = [self.waiting.popleft() for _ in range(count)]
        if not self.rows:
            self.newest = longest
        first = len(self.rows)
        # shorter prompts compute the end of the prefix anew rather than padding
        ids = [[0] * (width - len(self.prompts[index])) + list(self.prompts[index][-width:]) for index in batch]
        for number, index in enumerate(batch):
            row = _Row(index, self.newest - len(self.prompts[index]))
            known = max(0, len(self.prompts[index]) - width)
            if known:
                for block, prefix in zip(self.cache.blocks, self.prefix, strict=True):
                    block[first + number, :, row.start : row.start + known] = prefix[:, :known]
            self.rows.append(row)
        self.cache.see(slice(first, first + count), self.newest - longest, self.newest - width)
        added = self.rows[first:]
        for row, token in zip(added, self._forward(ids, [row.start for row in added]), strict=True):
            row.tokens.append(token)

    def _step(self) -> None:
        """One more token in every row."""
        start = min(row.start for row in self.rows)
        if self.newest == self.columns:
            self.cache.move_columns(len(self.rows), start, self.newest)
            self.newest -= start
            for row in self.rows:
                row.start -= start
            start = 0
        self.cache.see(slice(0, len(self.rows)), start, self.newest)
        self.newest += 1
        following = self._forward([row.tokens[-1:] for row in self.rows], [row.start for row in self.rows])
        for row, token in zip(self.rows, following, strict=True):
            row.tokens.append(token)

    def _forward(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
        """The token that follows each row; the rows' new tokens `[rows, new]` enter the span at its end."""
        device, span = self.model.device, self.cache.span
        tokens = torch.tensor(ids, device=device)
        begins = torch.tensor(starts, device=device)[:, None]
        columns = torch.arange(span.start, span.stop + tokens.shape[1], device=device)
        positions = (columns[None, span.stop - span.start :] - begins).clamp(min=0)
        output = self.model(
            input_ids=tokens,
            attention_mask=(columns >= begins).long(),
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
            **self.head,
        )
        return output.logits[:, -1].argmax(-1).tolist()

    def _dismiss(self) -> Iterator[tuple[int, list[int]]]:
        """The rows that have ended leave, and the last ones take their places."""
        ended = [number for number, row in enumerate(self.rows) if self.stop.ends(row.tokens)]
        if not ended:
            return
        gone = [self.rows[number] for number in ended]
        left = len(self.rows) - len(ended)
        staying = [number for number in range(left, len(self.rows)) if number not in ended]
        moves = dict(zip(staying, ended, strict=False))
        if moves:
            start = min(self.rows[number].start for number in moves)
            self.cache.move_rows(moves, start, self.newest)
        for source, target in moves.items():
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        for row in gone:
            yield row.prompt, row.tokens


def _needs_own_cache(model: PreTrainedModel, longest: int) -> str | None:
    """Why a model cannot run on columns, with rows of up to `longest` tokens; none where it can."""
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return "it has a cache of its own"
    if missing := {"cache", "position_ids"} - set(inspect.signature(model.forward).parameters):
        return f"its forward takes no {' and no '.join(sorted(missing))}"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "its attention is cut into chunks"
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
            return f"it keeps a state of its own kind ({type(layer).__name__})"
    if (limit := rescaled_beyond(model)) is not None and longest > limit:
        return f"beyond {limit} tokens, its position encoding depends on the longest row of a batch"
    return None


class _RowsEnd(StoppingCriteria):
    """Ends each row of a batch as `_Stop` says, and remembers after how many tokens."""

    def __init__(self, stop: _Stop, width: int) -> None:
        self.stop, self.width = stop, width
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        for number, tokens in enumerate(input_ids[:, self.width :].tolist()):
            if number not in self.lengths and self.stop.ends(tokens):
                self.lengths[number] = len(tokens)
        ended = [number in self.lengths for number in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


def _in_padded_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    stop: _Stop,
    prompts: Sequence[Sequence[int]],
    max_rows: int,
    token_budget: int,
) -> Iterator[tuple[int, list[int]]]:
    """By the model's own `generate`, padded on the left."""
    waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
    while waiting:
        width = len(prompts[waiting[0]])
        count = min(len(waiting), max_rows, max(1, token_budget // width))
        batch = [waiting.popleft() for _ in range(count)]
        padding = [width - len(prompts[index]) for index in batch]
        pad = tokenizer.pad_token_id or 0
        ids = [[pad] * left + list(prompts[index]) for left, index in zip(padding, batch, strict=True)]
        mask = [[0] * left + [1] * (width - left) for left in padding]
        rows_end = _RowsEnd(stop, width)
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=stop.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=[rows_end],
        )
        for number, (index, tokens) in enumerate(zip(batch, output[:, width:].tolist(), strict=True)):
            yield index, tokens[: rows_end.lengths[number]]


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
