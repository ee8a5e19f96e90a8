"""What `spath-eval speed` measures: FFNs alone, a model's prefill and decode, switching pathways, mixed batches.

Before anything is timed, compact execution is proved equal to masked execution, and seen to be applied in prefill and
decode. Several domains' pathways share the model's other weights and are all held in memory, so that a switch replaces
references and loads nothing. A batch of several domains runs either in parts, each in its own pathway, or as a whole in
the pathway that keeps what any of the domains keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spath_eval.masks import Mask
from spath_eval.pathways import Exercise, StaticPathway, check_parity
from spath_eval.sites import Site
from spath_eval.speed.ceilings import Bound, Phases, site_work, work
from spath_eval.speed.conditions import Rates, last_level_cache, load, measure_rates
from spath_eval.speed.entries import speed_entry, timing_entry
from spath_eval.speed.measurement import arm_bytes, exceeds_cache
from spath_eval.speed.timing import (
    COMPILED,
    EAGER,
    Arm,
    PairedTimes,
    Part,
    Pass,
    Stop,
    Workload,
    compiled,
    garbage_collection_off,
    measure,
    peak_memory,
    random_tokens,
    start_stopwatch,
    take_turns,
)
from spath_eval.texts import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spath_eval.speed.sources import Subject

PROBE = (2, 16)
"""Sequences and tokens on which executions are compared."""
SWITCHES = 50
"""Switches that are timed."""


@dataclass(frozen=True)
class Plan:
    """What is measured of each model."""

    workloads: tuple[Workload, ...]
    stop: Stop
    compiled: bool = False
    """Whether both arms are timed compiled, too."""
    seed: int = 0


def run(
    subjects: Iterable[Subject], plan: Plan, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Entries of the record's `speed` for all `subjects`, of which there is one at a time in memory.

    `say` is told what is measured next. Raises `GateError` where a pathway is not what it should be.
    """
    rates = None
    for subject in subjects:
        if rates is None:
            say("measuring what the device reads and multiplies in a second")
            rates = measure_rates(device, dtype)
        benchmark = Benchmark(subject.name, subject.model, subject.sites, plan, rates, say)
        for masks in subject.masks:
            pathways = {domain: benchmark.pathway(mask) for domain, mask in masks.items()}
            first = next(iter(pathways.values()))
            if subject.ffns:
                yield from benchmark.ffns(first)
            if subject.whole:
                yield from benchmark.whole(first)
            if subject.whole and len(pathways) > 1:
                yield benchmark.switching(pathways)
                yield from benchmark.mixed(pathways)
            del pathways, first
        del subject, benchmark


class Benchmark:
    """A model, and the entries that measuring it gives. `rates` are those of its device."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        sites: Sequence[Site],
        plan: Plan,
        rates: Rates,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.model, self.sites = name, model, sites
        self.plan, self.rates, self.say = plan, rates, say
        self.parity: dict[str, dict[str, Any]] = {}
        """By a mask's digest, how compact execution compares with masked execution."""

    def pathway(self, mask: Mask) -> StaticPathway:
        """The compact pathway of a mask, proved to be applied and to equal masked execution."""
        pathway = StaticPathway(self.sites, mask, "compact")
        if mask.digest not in self.parity:
            tokens = random_tokens(self.model, *PROBE, self.plan.seed)
            ones = torch.ones_like(tokens)
            probe = Batch(tokens, ones, ones.bool(), tuple(range(len(tokens))))
            exercise = Exercise(self.model, pathway)
            with pathway.applied(), exercise.watching():
                Pass(self.model, [Part(tokens)], 2)()
            exercise.check(("prefill", "decode"))
            self.parity[mask.digest] = check_parity(self.model, pathway, probe)
        return pathway

    def whole(self, pathway: StaticPathway) -> Iterator[dict[str, Any]]:
        """Prefill and decode of the model, for each workload and execution."""
        weights = arm_bytes(self.model, self.sites, pathway.mask)
        for workload in self.plan.workloads:
            self._announce(self.name, pathway, workload.batch, workload.tokens)
            noted, before = _compiler_counters(), load(self.model.device)
            times = measure(
                self.model,
                pathway.applied,
                workload,
                self.plan.stop,
                compiled=self.plan.compiled,
                seed=self.plan.seed,
            )
            conditions = self._conditions(before)
            peaks = peak_memory(self.model, pathway.applied, workload, weights)
            dense, sparse = (work(self.model, self.sites, mask, workload) for mask in (None, pathway.mask))
            for execution, found in times.items():
                entry = self._entry(self.name, found, dense, sparse, workload, weights["sparse"])
                entry |= self._about(pathway.mask.achieved, execution)
                entry |= {"parity": self.parity[pathway.mask.digest], "weight_bytes": weights}
                if execution == EAGER:
                    entry["peak_memory"] = {"dense": peaks.dense, "sparse": peaks.sparse}
                else:
                    entry |= {"peak_memory": None, "peak_memory_reason": "counted in eager execution only"}
                    entry["compiler"] = noted()
                yield entry | conditions

    def ffns(self, pathway: StaticPathway) -> Iterator[dict[str, Any]]:
        """The FFNs alone, one after another, for the tokens of each prefill and of a decode step."""
        name = f"FFN{'s' * (len(self.sites) > 1)} of {'the model' if self.name == 'model' else self.name}"
        kept = sum(site.weight_bytes(pathway.mask) for site in self.sites)
        executions = (EAGER, COMPILED) if self.plan.compiled else (EAGER,)
        sizes = [(one.batch, tokens) for one in self.plan.workloads for tokens in (1, one.tokens)]
        for batch, tokens in dict.fromkeys(sizes if kept else ()):
            self._announce(name, pathway, batch, tokens)
            noted, before = _compiler_counters(), load(self.model.device)
            inputs = self._inputs(pathway, batch, tokens)
            if self.plan.compiled:
                torch.compiler.reset()
            dense_arms, sparse_arms = (
                {
                    one: _FFNPass([(module(site), inputs[site.path]) for site in self.sites], one).arm
                    for one in executions
                }
                for module in (_dense, pathway.compact_module)
            )
            rounds = take_turns(dense_arms, sparse_arms, self.plan.stop)
            conditions = self._conditions(before)
            dense, sparse = (site_work(self.model, self.sites, mask, batch * tokens) for mask in (None, pathway.mask))
            bound = Bound.of(dense, sparse, "bytes" if tokens == 1 else "flops", self.rates)
            for execution in executions:
                timing = timing_entry(
                    rounds.compared(execution, 0),
                    bound,
                    batch=batch,
                    tokens=tokens,
                    exceeds_cache=exceeds_cache(kept, self.model.device),
                    precision=self.plan.stop.precision,
                )
                entry = {"subject": name, "ffn": timing} | self._about(pathway.mask.achieved, execution)
                yield entry | ({} if execution == EAGER else {"compiler": noted()}) | conditions

    def switching(self, pathways: Mapping[str, StaticPathway]) -> dict[str, Any]:
        """Switches from each domain's pathway to the next one's, and the bytes that all of them hold."""
        self.say(f"{self.name}: switching among {', '.join(pathways)}")
        before = load(self.model.device)
        seconds = time_switches(list(pathways.values()), SWITCHES)
        weights = {name: arm_bytes(self.model, self.sites, one.mask) for name, one in pathways.items()}
        ffn = sum(site.weight_bytes(None) for site in self.sites)
        shared = next(iter(weights.values()))["dense"] - ffn
        entry = {
            "subject": f"{self.name}: switching among {len(pathways)} pathways",
            "switch": {
                "seconds": seconds,
                "domains": list(pathways),
                "memory": {
                    "shared": shared,
                    "dense_ffn": ffn,
                    "pathways": {name: one["sparse"] - shared for name, one in weights.items()},
                },
            },
        }
        achieved = sum(one.mask.achieved for one in pathways.values()) / len(pathways)
        return entry | self._about(achieved, EAGER) | self._conditions(before)

    def mixed(self, pathways: Mapping[str, StaticPathway]) -> Iterator[dict[str, Any]]:
        """Batches of several domains' sequences, dense, by sub-batches, and by the union of the domains' masks."""
        for workload in self.plan.workloads:
            chosen = dict(list(pathways.items())[: workload.batch])
            if len(chosen) > 1:
                yield from self._mixed(chosen, workload)
            else:
                self.say(f"{self.name}: a batch of 1 is of one domain, so that none of mixed domains is measured")

    def _mixed(self, pathways: Mapping[str, StaticPathway], workload: Workload) -> Iterator[dict[str, Any]]:
        masks = [one.mask for one in pathways.values()]
        union = self.pathway(union_of(masks))
        name = f"{self.name}: {len(masks)} domains in a batch"
        self._announce(name, union, workload.batch, workload.tokens)
        before = load(self.model.device)
        prompt = random_tokens(self.model, workload.batch, workload.tokens, self.plan.seed)
        rows = prompt.tensor_split(len(masks))
        parts = [Part(part, one.applied) for part, one in zip(rows, pathways.values(), strict=True)]

        def one_pass(parts: Sequence[Part]) -> Pass:
            return Pass(self.model, parts, workload.new_tokens)

        rounds = take_turns(
            {EAGER: Arm(one_pass([Part(prompt)]))},
            {"sub-batches": Arm(one_pass(parts)), "the union": Arm(one_pass([Part(prompt)]), union.applied)},
            self.plan.stop,
        )
        conditions = self._conditions(before)
        counted = partial(work, self.model, self.sites)
        sizes = [Workload(len(part), workload.tokens, workload.new_tokens) for part in rows]
        first, *more = (counted(mask, size) for mask, size in zip(masks, sizes, strict=True))
        held = [arm_bytes(self.model, self.sites, mask) for mask in masks]
        rest = held[0]["dense"] - sum(site.weight_bytes(None) for site in self.sites)
        united = arm_bytes(self.model, self.sites, union.mask)
        for how, achieved, least_weights, weights, sparse in (
            (
                "sub-batches",
                sum(mask.achieved for mask in masks) / len(masks),
                min(one["sparse"] for one in held),
                united | {"sparse": rest + sum(one["sparse"] - rest for one in held)},
                sum(more, first),
            ),
            ("the union", union.mask.achieved, united["sparse"], united, counted(union.mask, workload)),
        ):
            times = PairedTimes(rounds.compared(how, 0), rounds.compared(how, 1))
            entry = self._entry(f"{name}, by {how}", times, counted(None, workload), sparse, workload, least_weights)
            entry |= self._about(achieved, EAGER) | {"domains": list(pathways), "weight_bytes": weights}
            yield entry | conditions

    def _entry(
        self, name: str, times: PairedTimes, dense: Phases, sparse: Phases, workload: Workload, weights: int
    ) -> dict[str, Any]:
        return speed_entry(
            name,
            times,
            (
                Bound.of(dense.prefill, sparse.prefill, "flops", self.rates),
                Bound.of(dense.decode, sparse.decode, "bytes", self.rates),
            ),
            workload,
            exceeds_cache=exceeds_cache(weights, self.model.device),
            precision=self.plan.stop.precision,
        )

    def _about(self, sparsity: float, execution: str) -> dict[str, Any]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"device": str(self.model.device), "dtype": dtype, "sparsity": sparsity, "execution": execution}

    def _conditions(self, before: Mapping[str, float]) -> dict[str, Any]:
        """The entry's `conditions`: what the device can do, and what else there was, before and after."""
        device = self.model.device
        after = load(device)
        found: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "bytes_per_second": self.rates.bytes_per_second,
            "flops_per_second": self.rates.flops_per_second,
        }
        if (cache := last_level_cache(device)) is not None:
            found["last_level_cache"] = cache
        return {"conditions": found | {name: [before[name], after[name]] for name in before if name in after}}

    def _announce(self, name: str, pathway: StaticPathway, batch: int, tokens: int) -> None:
        self.say(f"{name}: sparsity {pathway.mask.achieved:.3f}, {batch} x {tokens} tokens")

    def _inputs(self, pathway: StaticPathway, batch: int, tokens: int) -> dict[str, tuple[Tensor, ...]]:
        """What each site is called with in a forward of the pathway, whose routers choose no removed expert.

        Hidden states of equal size are those of the first site: all of them would take much memory.
        """
        shared: dict[tuple[Any, ...], Tensor] = {}
        inputs: dict[str, tuple[Tensor, ...]] = {}

        def own(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value.clone()
            key = (value.shape, value.dtype, value.device)
            if key not in shared:
                shared[key] = value.clone()
            return shared[key]

        def remember(path: str, module: nn.Module, values: tuple[Tensor, ...]) -> None:
            inputs[path] = tuple(map(own, values))

        with ExitStack() as stack:
            stack.enter_context(pathway.applied())
            for site in self.sites:
                handle = site.installed_module.register_forward_pre_hook(partial(remember, site.path))
                stack.callback(handle.remove)
            with torch.no_grad():
                self.model.get_decoder()(input_ids=random_tokens(self.model, batch, tokens, self.plan.seed))
        return inputs


def time_switches(pathways: Sequence[StaticPathway], count: int) -> list[float]:
    """Seconds of `count` switches from one pathway to the next, round and round."""
    seconds = []
    with ExitStack() as stack, garbage_collection_off():
        stack.enter_context(pathways[-1].applied())
        for number in range(count):
            started = time.perf_counter()
            stack.close()
            stack.enter_context(pathways[number % len(pathways)].applied())
            seconds.append(time.perf_counter() - started)
    return seconds


def union_of(masks: Sequence[Mask]) -> Mask:
    """The mask that keeps what any of `masks` keeps, experts included."""
    keep = {path: torch.stack([mask[path] for mask in masks]).any(0) for path in masks[0].keep}
    cut = set.intersection(*(set(mask.experts) for mask in masks))
    return Mask(keep, {}, {path: torch.stack([mask.experts[path] for mask in masks]).any(0) for path in sorted(cut)})


class _FFNPass:
    """FFNs, called one after another with inputs of their own."""

    def __init__(self, calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]], execution: str) -> None:
        self.device = calls[0][1][0].device
        self._run: Callable[[], object] = partial(_discard, calls)
        if execution == COMPILED:  # which would leave out what nobody uses
            self._run = compiled(partial(_call, calls), self.device)
        self.arm = Arm(self, warm_ups=3 if execution == COMPILED else 1)

    def __call__(self) -> list[float]:
        with torch.no_grad(), garbage_collection_off():
            stopwatch = start_stopwatch(self.device)
            self._run()
            stopwatch.mark()
            return stopwatch.laps()


def _discard(calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    for module, inputs in calls:
        module(*inputs)


def _call(calls: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> list[Tensor]:
    return [module(*inputs) for module, inputs in calls]


def _dense(site: Site) -> nn.Module:
    return site.module


def _compiler_counters() -> Callable[[], dict[str, int]]:
    """Begin to count; what is returned says how often the compiler gave up since."""
    from torch._dynamo.utils import counters

    counters.clear()
    return lambda: {
        "graph_breaks": sum(counters["graph_break"].values()),
        "skipped_cuda_graphs": counters["inductor"]["cudagraph_skips"],
    }
