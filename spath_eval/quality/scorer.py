"""An lm-eval model that scores as lm-eval's `hf` does, without computing what is not needed.

`SpathLM` is lm-eval's `HFLM` (the same tokens, truncation and defaults) with another engine beneath. Inputs that begin
alike are computed once (`packing`), each position attends to its own text alone, logits are computed only where an
answer is scored, in float32, and every forward makes one transfer to the host. The attention pattern is put in place of
the masks that transformers makes, of which it keeps the rule (causal, sliding window, chunks) by applying it to
positions in the text: so it holds for every layer type. A model that cannot be run so (found by comparing a few tokens
at the first use) is scored in plain batches by `HFLM` itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from spath_eval.contracts import UsageError
from spath_eval.models import logits_buffer, output_head, rescaled_beyond
from spath_eval.quality.generation import generate, why_not
from spath_eval.quality.packing import Costs, Plan, Request, Step
from spath_eval.quality.vocabulary import likelihoods

log = logging.getLogger(__name__)

BUDGET = {"cpu": 1024, "cuda": 16384}
"""Tokens of a forward."""
ROW = {"cpu": 128, "cuda": 512}
"""Tokens of a row in which short texts stand side by side."""
OVERHEAD = {"cpu": 128.0, "cuda": 4096.0}
"""What one more forward costs, in tokens."""
SMALLEST = 64
"""Token budget below which running out of memory is final."""
ROWS = 32
"""Rows that generate at a time, where no `batch_size` says how many."""
LOGITS = 32 * 2**20
"""Logits that are held at a time."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest difference of a packed from a plain forward, relative to the largest logit, by which it is found equal."""
ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of token pairs."""


Tokens = list[tuple[Any, list[int], list[int]]]
"""A request's strings (or, of a window, the number of its text) with the tokens of its context and continuation."""


class SpathLM(HFLM):
    """A drop-in for lm-eval's `hf` model: the same keywords, the same scores, sooner.

    `batch_size` counts only where a model has to be scored in plain batches, and as the rows that generate at a time;
    log-likelihoods are computed by a token budget, which halves for good where memory does not suffice.
    """

    def __init__(self, pretrained: str | PreTrainedModel, *, device: str | None = None, **settings: Any) -> None:
        settings.setdefault("softmax_dtype", torch.float32)
        settings.setdefault("backend", "causal")
        super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **settings)
        self.token_budget = BUDGET.get(self.device.type, BUDGET["cuda"])
        self.truncated = 0
        """Requests so far that were longer than the model's input and lost tokens on their left."""
        self._encoded: dict[tuple[Any, ...], Tokens] = {}
        self._tokens: dict[str, list[int]] = {}
        """Those of strings that were encoded at once."""
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._plain: bool | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        key = tuple(request.args for request in requests)
        if key not in self._encoded:
            self._encoded[key] = self._encode(requests)
        return self._loglikelihood_tokens(self._encoded[key], disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's input."""
        key = ("rolling", *(request.args for request in requests))
        if key not in self._encoded:
            self._encoded[key] = [
                (number, *utils.make_disjoint_window(window))
                for number, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
        windows = self._encoded[key]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(None, context, answer) for _, context, answer in windows])
        for (number, _, _), (score, _) in zip(windows, found, strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that each context is continued with, up to the first of its stop strings."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            reason = why_not(self.model, {k: v for k, v in settings.items() if k not in ("until", "max_gen_toks")})
            if reason or self.think_end_token is not None:
                log.warning("lm-eval's own generation is used, because %s", reason or "the model is asked to think")
                own = super().generate_until([requests[number] for number in numbers], disable_tqdm=True)
            else:
                own = self._continue([requests[number].args[0] for number in numbers], dict(settings))
            texts.update(zip(numbers, own, strict=True))
            for number in numbers:
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Greedy continuations of contexts, as lm-eval cuts and cleans them."""
        until = handle_stop_sequences(
            settings["until"], eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        room = self.max_length - settings["max_gen_toks"]
        if room <= 0:
            raise UsageError(
                f"a task asks for {settings['max_gen_toks']} generated tokens, which leave no room for its prompt in "
                f"the model's {self.max_length}: leave the task out"
            )
        prompts = [self.tok_batch_encode([context])[0][0].tolist() for context in contexts]
        self.truncated += sum(len(prompt) > room for prompt in prompts)
        rows = self.batch_size if isinstance(self.batch_size, int) else ROWS
        found: dict[int, list[int]] = {}
        while waiting := [number for number in range(len(prompts)) if number not in found]:
            try:
                for place, tokens in generate(
                    self.model,
                    self.tokenizer,
                    [prompts[number][-room:] for number in waiting],
                    until=until,
                    max_new_tokens=settings["max_gen_toks"],
                    max_rows=rows,
                    token_budget=self.token_budget // 2,  # long prompts are computed one by one, which needs no mask
                ):
                    found[waiting[place]] = tokens
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.token_budget // 2 < SMALLEST:
                    raise
                self.halve_budget()
                rows = max(1, rows // 2)
        return [postprocess_generated_text(self.tok_decode(found[n]), until, None) for n in range(len(prompts))]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask, `[strings, tokens]` each, padded; counts what is cut."""
        if left_truncate_len is not None:
            self.truncated += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, **settings)

    @property
    def plain(self) -> bool:
        """Whether the model is scored in plain batches, because it cannot be scored packed."""
        if self._plain is None:
            reason = self._why_plain()
            self._plain = reason is not None
            if reason:
                log.warning("%s: scored in plain batches, because %s", type(self.model).__name__, reason)
        return self._plain

    def _encode(self, requests: Sequence[Any]) -> Tokens:
        """The tokens of contexts and continuations, as lm-eval splits them."""
        pairs = [request.args for request in requests]
        asked = (text for context, answer in pairs if context for text in (context.rstrip(), context + answer))
        self._tokens = self._encode_at_once(list(dict.fromkeys(asked)))
        encoded: Tokens = []
        for context, continuation in pairs:
            if context == "":
                first, answer = self.prefix_token_id, self.tok_encode(continuation, add_special_tokens=False)
                pair = (answer[:1], answer[1:]) if answer[:1] == [first] else ([first], answer)
            else:
                pair = self._encode_pair(context, continuation)
            encoded.append(((context, continuation), *pair))
        self._tokens = {}
        return encoded

    def _encode_at_once(self, strings: Sequence[str]) -> dict[str, list[int]]:
        """The tokens of each string that lm-eval does not encode in a way of its own, on all cores."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        usual = [string for string in strings if not string.startswith(begin)]
        if not usual:
            return {}
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        return dict(zip(usual, self.tokenizer(usual, **special)["input_ids"], strict=True))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **settings: Any,
    ) -> list[int]:
        """The tokens of `string`."""
        if add_special_tokens is None and left_truncate_len is None and string in self._tokens:
            return self._tokens[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **settings)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **settings: Any) -> list[tuple[float, bool]]:
        if not requests:
            return []
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        longest, limit = max(len(context) + len(answer) for _, context, answer in requests), rescaled_beyond(self.model)
        if self.plain or (limit is not None and longest > limit):
            return super()._loglikelihood_tokens(list(requests), **settings)
        found = self._score(
            [
                Request(tuple((context + answer)[-(self.max_length + 1) :][:-1]), tuple(answer))
                for _, context, answer in requests
            ]
        )
        for (strings, _, _), answer in zip(requests, found, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return found

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's targets, and whether greedy decoding gives them."""
        if any(not 0 < len(request.targets) <= len(request.tokens) for request in requests):
            raise ValueError("a continuation needs a token at least, one before it, and room in the model's input")
        plan = self._plan(requests)
        scores = np.full((2, plan.offsets[-1]), np.nan)
        while True:
            try:
                self._run(plan, scores)
                break
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.token_budget // 2 < SMALLEST:
                    raise
            self.halve_budget()
            plan = self._plan(requests)
        starts = plan.offsets[:-1]
        totals, greedy = np.add.reduceat(scores[0], starts), np.minimum.reduceat(scores[1], starts)
        return [(float(total), bool(all_)) for total, all_ in zip(totals, greedy, strict=True)]

    def halve_budget(self) -> None:
        """Go on with half the tokens in a forward, and say so."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.token_budget //= 2
        self._plans.clear()
        log.warning("out of memory: going on with %d tokens in a forward", self.token_budget)

    def _plan(self, requests: Sequence[Request]) -> Plan:
        key = (self.token_budget, *requests)
        if key not in self._plans:
            self._plans[key] = Plan(requests, self._costs())
        return self._plans[key]

    def _costs(self) -> Costs:
        kind = self.device.type if self.device.type in BUDGET else "cuda"
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        embeddings = {id(weight) for end in ends for weight in end.parameters()}
        linear = sum(p.numel() for p in self.model.parameters() if id(p) not in embeddings)
        # queries times keys and weights times values, somewhat slower than one large product
        pair = 1.5 * 2 * width * config.num_hidden_layers
        return Costs(self.token_budget, min(ROW[kind], self.token_budget), OVERHEAD[kind], max(linear / pair, 1.0))

    def _run(self, plan: Plan, scores: np.ndarray) -> None:
        """Run the forwards of a plan and write the targets' log-likelihoods and greediness to `scores`."""
        caches: list[Cache | None] = [None]
        chunk = max(1, LOGITS // self.model.config.get_text_config().vocab_size)
        with torch.inference_mode():
            buffer = logits_buffer(self.model, chunk)
            for step in plan.steps:
                del caches[step.level + 1 :]
                hidden, cache = self._forward(step, caches[-1])
                if step.last:
                    caches[-1] = None
                if step.keep:
                    caches.append(cache)
                self._write(step, hidden, scores, chunk, buffer)

    def _forward(self, step: Step, before: Cache | None) -> tuple[Tensor, Cache | None]:
        """Final hidden states `[rows, width, hidden]` of a step, and the cache with its tokens where it is kept."""
        height, width = len(step.rows), step.width
        past = 0 if before is None else before.get_seq_length()
        ids, positions = np.zeros((2, height, width), dtype=np.int64)
        for row, tree in enumerate(step.rows):
            ids[row, : len(tree)], positions[row, : len(tree)] = tree.tokens, tree.positions
        cache = _branch(before, height) if before is not None else DynamicCache() if step.keep else None
        settings = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "cache": cache,
            "use_cache": cache is not None,
        }
        decoder = self.model.get_decoder()
        if step.plain:
            return decoder(**settings).last_hidden_state, cache
        attends = np.zeros((height, width, past + width), dtype=np.bool_)
        attends[:, np.arange(width), past + np.arange(width)] = True  # padding attends to itself
        for row, tree in enumerate(step.rows):
            attends[row, : len(tree), :past] = True
            attends[row, : len(tree), past : past + len(tree)] = tree.ancestors()
        at = torch.from_numpy(positions).to(self.device)
        seen = torch.ones(height, past + width, dtype=torch.long, device=self.device)
        with _attending(torch.from_numpy(attends).to(self.device), at, past):
            return decoder(**settings, attention_mask=seen, position_ids=at).last_hidden_state, cache

    def _write(self, step: Step, hidden: Tensor, scores: np.ndarray, chunk: int, buffer: Tensor | None) -> None:
        """The scores of a step, the logits of `chunk` positions at a time."""
        nodes = np.concatenate([tree.nodes + row * step.width for row, tree in enumerate(step.rows)])
        places, which = np.unique(nodes, return_inverse=True)
        if not len(places):
            return
        hidden = hidden.flatten(0, 1)[torch.from_numpy(places).to(self.device)]
        rows = torch.from_numpy(which).to(self.device)
        target = torch.from_numpy(np.concatenate([tree.targets for tree in step.rows])).to(self.device)
        parts = []
        for start in range(0, len(places), chunk):
            logits = output_head(self.model, hidden[start : start + chunk], buffer)
            first, last = np.searchsorted(which, [start, start + chunk])
            parts.append(likelihoods(logits, rows[first:last] - start, target[first:last]))
        slots = np.concatenate([tree.slots for tree in step.rows])
        scores[:, slots] = torch.cat(parts, dim=1).cpu().double().numpy()

    def _why_plain(self) -> str | None:
        """Why the model cannot be scored packed, or none where a packed forward gives what plain ones give."""
        implementation = self.model.config.get_text_config()._attn_implementation
        if implementation not in ATTENTION:
            return f"its attention implementation {implementation!r} takes no mask of token pairs"
        generator = np.random.default_rng(0)
        if any(buffer.dtype == torch.bool and buffer.ndim == 4 for buffer in self.model.buffers()):
            return "it masks its attention by places in the row"
        begin, *ends = (tuple(generator.integers(3, 30, size).tolist()) for size in (9, 6, 4, 5))
        texts = [begin + ends[0], begin + ends[1], begin + ends[1][:2] + ends[2], ends[0]]
        requests = [Request(text[:-1], text[1:]) for text in texts]
        plan = Plan(requests, Costs(16, 16, 0.0, 1e9))
        scores = np.full((2, plan.offsets[-1]), np.nan)
        try:
            self._run(plan, scores)
        except Exception as error:
            if _is_out_of_memory(error):
                raise
            log.debug("packed forward", exc_info=True)
            return f"a packed forward failed: {type(error).__name__}: {error}"
        for number, text in enumerate(texts):
            with torch.inference_mode():
                logits = self.model(torch.tensor([text[:-1]], device=self.device)).logits[0].float()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(text[1:], device=self.device)[:, None])[:, 0]
            packed = scores[0, plan.offsets[number] : plan.offsets[number + 1]]
            allowed = TOLERANCE.get(self.model.dtype, 1e-3) * max(1.0, float(logits.abs().max()))
            difference = float(np.abs(packed - expected.cpu().numpy()).max())
            if not difference <= allowed:
                return f"a packed forward gives other log-likelihoods (by {difference:.2g})"
        return None


def _branch(cache: Cache, rows: int) -> Cache:
    """A cache that goes on from `cache` in several rows and leaves it as it is."""
    branch = DynamicCache()
    for layer in cache.layers:
        twig = copy.copy(layer)
        if isinstance(twig, DynamicLayer) and twig.keys is not None and twig.values is not None:
            twig.keys = twig.keys.expand(rows, -1, -1, -1)
            twig.values = twig.values.expand(rows, -1, -1, -1)
        branch.layers.append(twig)
    return branch


@contextmanager
def _attending(attends: Tensor, positions: Tensor, past: int) -> Iterator[None]:
    """Within the context, tokens (`[rows, width]`, behind `past` cached ones) attend to those for which `attends`
    (`[rows, width, past + width]`) is true, as far as the layer's own rule allows it at their positions in the text."""
    rows = attends.shape[0]
    cached = torch.arange(past, device=positions.device).expand(rows, -1)
    queries, keys = positions[:, None, :, None], torch.cat([cached, positions], dim=1)[:, None, None, :]
    batch = torch.arange(rows, device=positions.device)[:, None, None, None]

    def mask(mask_function: Callable[..., Tensor], **settings: Any) -> Tensor:
        return attends[:, None] & mask_function(batch, torch.zeros_like(batch), queries, keys)

    def additive(dtype: torch.dtype, **settings: Any) -> Tensor:
        allowed = mask(**settings)
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    own = {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ATTENTION}
    try:
        ALL_MASK_ATTENTION_FUNCTIONS.update(sdpa=mask, eager=additive)
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.update(own)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
