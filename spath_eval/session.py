"""The protocol of a run: load, profile, score dense, then per case mask, gates, sparse scores, speed, record.

A `Session` holds what a run is made of and is what hooks are handed. A `LoadedModel` holds what is computed once per
model and shared by its cases: weights, domain profiles, dense scores, dense outputs on held-out text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spath_eval import records
from spath_eval.collection import POOLED, Case, Limits, collect, cross, keyword_filter
from spath_eval.contracts import Architecture, Budget, Context, Domain, LoadRequest, Strategy, UsageError
from spath_eval.masks import Mask, jaccard
from spath_eval.models import (
    GuessedArchitecture,
    check_device_map,
    device_map,
    find_architecture,
    fingerprint,
    parameter_count,
    read_config,
    resolve_device,
    resolve_dtype,
    tokenizer_digest,
    weight_bytes,
)
from spath_eval.pathways import (
    Execution,
    Exercise,
    GateError,
    Neutrality,
    Pathway,
    PromptPathway,
    StaticPathway,
    TokenPathway,
    check_neutrality,
    check_parity,
)
from spath_eval.profiling import (
    ROUTING,
    STATISTICS,
    DomainProfile,
    Profile,
    cached_profile,
    pooled,
    profile_domain,
    specialisation,
)
from spath_eval.quality.adapter import (
    Evaluation,
    PathwayLM,
    Scores,
    chance,
    evaluate,
    item_texts,
    task_record,
)
from spath_eval.quality.benchmarks import load_tasks
from spath_eval.quality.overlap import overlaps
from spath_eval.quality.paired import Arm, compare_arms, compare_quality, noise_floor, score_record
from spath_eval.quality.preservation import Nats, Preservation
from spath_eval.registry import Registry
from spath_eval.sites import Site, quantisation
from spath_eval.texts import Batch, Corpus, batches, digest, in_hash_order, read_corpus

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

log = logging.getLogger(__name__)

PASSAGE_LINES = 12
"""Lines up to which a prompt is recognised inside a longer document."""
PROBE_TOKENS = 96
"""Tokens of the batch on which the gates compare executions."""
SHARED_WORDS = 13
"""Words in a row by which an item and the profile text overlap."""
OVERLAP_LIMIT = 0.02
"""Share of a task's documents, and at least one, that may do so by chance: texts quote, count and begin alike."""
CONVERGED = 0.7
"""Jaccard of the masks of two halves of a text, below which the text is too short to choose by."""


@dataclass(frozen=True)
class Options:
    """What a run was asked for; the fields are the options of `spath-eval run`."""

    models: tuple[str, ...] = ()
    """Hub ids, folders or GGUF files; none means the small trained checkpoint of `arch`."""
    arch: str = "auto"
    sites: str | None = None
    """Module paths of down projections, of which the FFN sites are guessed instead of asking a family."""
    revision: str | None = None
    domains: tuple[str, ...] = ()
    """None means all."""
    strategies: tuple[str, ...] = ("negative",)
    sparsities: tuple[float, ...] = (0.15,)
    expert_sparsity: float = 0.0
    mask: Path | None = None
    execution: Execution = "compact"
    cross: bool = False
    """Whether each domain's mask, and one of all domains together, is evaluated on every domain."""
    speed: bool = True
    quality: bool = True
    """Whether tasks are evaluated; output preservation always is."""
    noise_floor: bool = False
    """Whether the dense model is evaluated once more with another batch size."""
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The lm-eval tasks of domains, in the place of their own."""
    include_path: tuple[Path, ...] = ()
    """Folders with task files of the user's."""
    data_dir: Path | None = None
    """Folder with the rows of lm-eval's own tasks."""
    hub: bool = False
    """Whether the domains' public benchmarks are evaluated with rows from the hub."""
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    """Whether what a model writes is executed, in a sandbox, where a task scores it so."""
    limit: int | Limits | None = None
    seed: int = 0
    keyword: str | None = None
    exitfirst: bool = False
    device: str = "auto"
    device_map: str | None = None
    """How the model is spread over all devices, instead of lying on `device`: one of `models.DEVICE_MAPS`."""
    dtype: str = "auto"
    batch_size: int = 32
    profile_text: Mapping[str, Path | str] = field(default_factory=dict)
    profile_tokens: int = 20_000
    preservation_tokens: int = 5_000
    allow_overlap: bool = False
    output: Path | None = None
    plugin: Mapping[str, Any] = field(default_factory=dict)
    """Options that plugins added, by parameter name."""


@dataclass(frozen=True)
class GivenMask(Strategy):
    """A mask made elsewhere, `--mask FILE`."""

    name = "mask"

    file: Path = Path()

    def select(self, context: Context) -> Mask:
        return Mask.load(self.file)


@dataclass(frozen=True)
class Target:
    """A model that a run will load."""

    name: str
    reference: str
    architecture: Architecture


Load = Callable[[LoadRequest], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


class Session:
    """One run."""

    def __init__(
        self,
        options: Options,
        registry: Registry,
        command: Mapping[str, Any] | None = None,
        load: Load | None = None,
    ) -> None:
        """`command` is what the record says of how it was asked for; `load` loads models instead of the plugins, and
        may hand out one that it keeps: a run leaves a model as it was."""
        self.options = options
        self.registry = registry
        self.command = {"given": [], **(command or {})}
        self._load_model: Load = load or (lambda request: registry.hook.spath_load_model(request=request))
        check_device_map(options.device_map, options.device)
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.targets = self._targets()
        self.domains = [registry.domain(name) for name in options.domains or registry.domains]
        if unknown := [name for name in options.profile_text if name not in registry.domains]:
            registry.domain(unknown[0])
        self.corpora: dict[str, Corpus] = {name: read_corpus(path) for name, path in options.profile_text.items()}
        self.limits = options.limit if isinstance(options.limit, Limits) else Limits(options.limit)
        self.cases = self._collect()
        self.tasks: dict[str, dict[str, ConfigurableTask]] = {}
        """The lm-eval tasks of each domain, once the run has begun."""
        self.results: list[dict[str, Any]] = []
        self.loaded: LoadedModel | None = None
        """The model whose cases are running."""
        self.pathway: Pathway | None = None
        """The pathway of the case that is running, once it was scored."""
        self._model_records: list[dict[str, Any]] = []
        self._shared: list[dict[str, list[dict[str, Any]]]] = []
        self._samples: list[dict[str, Any]] = []
        self._comparisons: list[dict[str, Any]] = []
        self.status = "complete"
        self.created = datetime.now(UTC)
        self.output = options.output or self._default_output()

    def run(
        self,
        on_start: Callable[[], None] = lambda: None,
        on_case: Callable[[dict[str, Any]], None] = lambda case: None,
    ) -> dict[str, Any]:
        """Run all cases and return the record, which is also written.

        `on_start` is called once nothing can be refused any more, `on_case` with each case as it ends. Ctrl-C ends the
        run: the record then has status `interrupted` and holds the finished cases. Raises `UsageError` for a model or
        an output that is not to be had.
        """
        records.check_writable(self.output)
        for domain in {case.evaluated_on.name: case.evaluated_on for case in self.cases}.values():
            self.tasks[domain.name] = self._load_tasks(domain)
        try:
            for target in self.targets:
                cases = [case for case in self.cases if case.model == target.name]
                if cases and self._load(target, cases, on_case):
                    if len(self._model_records) == 1:
                        on_start()
                    self._run_model(cases, on_case)
                if self._stopped:
                    break
        except KeyboardInterrupt:
            self.status = "interrupted"
        record = self._record()
        records.write(record, self.output)
        return record

    def load(self, target: Target) -> LoadedModel:
        """Load a model through the plugins."""
        options = self.options
        request = LoadRequest(
            target.reference, options.revision, target.architecture, self.device, self.dtype, options.device_map
        )
        model, tokenizer = self._load_model(request)
        return LoadedModel(target, model, tokenizer, self)

    def _load_tasks(self, domain: Domain) -> dict[str, ConfigurableTask]:
        """The tasks on which a domain is evaluated: those asked for, else public benchmarks where their rows are at
        hand, else its own."""
        options = self.options
        if not options.quality:
            return {}
        public = domain.benchmarks if (options.data_dir or options.hub) and not options.tasks else ()
        return load_tasks(
            options.tasks.get(domain.name) or public or domain.tasks,
            [*options.include_path, *domain.task_paths],
            data_dir=options.data_dir,
            num_fewshot=options.num_fewshot,
            limits=self.limits,
            allow_code_execution=options.allow_code_execution,
        )

    @property
    def exit_status(self) -> int:
        """pytest's: 0 fine, 1 a case failed or errored, 2 interrupted."""
        if self.status == "interrupted":
            return 2
        return int(any(case["outcome"] in ("failed", "error") for case in self.results))

    @property
    def _stopped(self) -> bool:
        return self.options.exitfirst and self.exit_status == 1

    def _load(self, target: Target, cases: Sequence[Case], on_case: Callable[[dict[str, Any]], None]) -> bool:
        """Load a model for its cases. Where that fails after another one was measured, its cases are errors."""
        try:
            loaded = self.load(target)
            if self.options.mask:
                Mask.load(self.options.mask).check(loaded.sites)
            if self.options.expert_sparsity and not any(site.experts for site in loaded.sites):
                raise UsageError(f"--expert-sparsity: {target.name} has no routed experts")
            unsliceable = (site.unsliceable for site in loaded.sites)
            if any(case.execution == "compact" for case in cases) and (reason := next(filter(None, unsliceable), None)):
                raise UsageError(reason)
        except UsageError as error:
            if not self._model_records:
                raise
            for case in cases:
                self.results.append(self._describe(case) | {"outcome": "error", "message": str(error)})
                on_case(self.results[-1])
            return False
        self.loaded = loaded
        self._model_records.append(loaded.record())
        return True

    def _run_model(self, cases: Sequence[Case], on_case: Callable[[dict[str, Any]], None]) -> None:
        assert self.loaded is not None
        try:
            for case in cases:
                result = self._run_case(case)
                self.results.append(result)
                on_case(result)
                if self._stopped:
                    return
        finally:
            self._shared.append(self.loaded.shared_records())
            self._samples += self.loaded.dense_samples()
            self._comparisons += compare_arms(self.loaded.arms, self.options.seed)
            self.loaded = self.pathway = None  # so that two models are never in memory together

    def _run_case(self, case: Case) -> dict[str, Any]:
        started = time.perf_counter()
        self.pathway = None
        result = self._describe(case)
        try:
            result |= self.registry.hook.spath_run_case(case=case, session=self)
            result["outcome"] = "passed"
        except GateError as error:
            result |= {"outcome": "failed", "message": str(error)}
        except Exception as error:
            log.debug("case %s", case.id, exc_info=True)
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            result |= {"outcome": "error", "message": f"{kind}{error}"}
        result["seconds"] = time.perf_counter() - started
        self._samples += [{"case": case.id, **row} for row in result.pop("_samples", ())]
        return result

    def _describe(self, case: Case) -> dict[str, Any]:
        strategy = case.strategy
        about = {
            "name": strategy.name,
            "options": dataclasses.asdict(strategy),
            "kind": strategy.kind,
            "control": strategy.control,
        }
        if not isinstance(strategy, GivenMask):
            about["plugin"] = self.registry.owner("strategy", strategy.name).name
        return {
            "id": case.id,
            "model": case.model,
            "arch": next(target.architecture.name for target in self.targets if target.name == case.model),
            "domain": case.domain.name,
            "evaluated_on": case.evaluated_on.name,
            "strategy": about,
            "execution": case.execution,
        }

    def _targets(self) -> list[Target]:
        options = self.options
        if options.sites is not None and options.arch != "auto":
            raise UsageError("--sites stands in for a family, and --arch names one: give one of the two")
        if not options.models:
            if options.arch == "auto":
                with_checkpoint = [name for name, a in self.registry.architectures.items() if a.checkpoint]
                raise UsageError(f"name a model with --model, or a family with --arch: {', '.join(with_checkpoint)}")
            architecture = self.registry.architecture(options.arch)
            if architecture.checkpoint is None:
                raise UsageError(f"architecture {architecture.name!r} has no small checkpoint of its own: give --model")
            return [Target(architecture.name, str(architecture.checkpoint), architecture)]
        targets = []
        for reference in options.models:
            config = read_config(reference, options.revision)
            path = Path(reference)
            name = path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name
            architecture = (
                find_architecture(self.registry, config, options.arch)
                if options.sites is None
                else GuessedArchitecture(model_types=(config.model_type,), pattern=options.sites)
            )
            targets.append(Target(name, reference, architecture))
        if len({target.name for target in targets}) < len(targets):
            raise UsageError("two models have the same name, so that their cases could not be told apart")
        return targets

    def _collect(self) -> list[Case]:
        options = self.options
        names = [target.name for target in self.targets]
        if options.mask is None:
            strategies: list[Strategy] = [
                strategy
                for text in options.strategies
                for strategy in (self._all_static() if text == "all" else [self.registry.parse_strategy(text)])
            ]
            cases = collect(
                names, self.domains, strategies, options.sparsities, options.execution, options.expert_sparsity
            )
        else:
            sparsity = round(Mask.load(options.mask).achieved, 4)
            cases = collect(names, self.domains, [GivenMask(options.mask)], [sparsity], options.execution)
        if options.cross:
            if options.mask:
                raise UsageError("--cross selects masks for each domain, and --mask gives one: give one of the two")
            if any(domain.name == POOLED for domain in self.domains):
                raise UsageError(f"--cross calls the mask of all domains {POOLED}, which is a domain's name here")
            cases = cross(cases, self.domains)
        self.registry.hook.spath_collection_modifyitems(cases=cases, session=self)
        if options.keyword:
            chosen = keyword_filter(options.keyword)
            cases = [case for case in cases if chosen(case.id)]
        return cases

    def _all_static(self) -> list[Strategy]:
        return [self.registry.parse_strategy(n) for n, one in self.registry.strategies.items() if one.kind == "static"]

    def _default_output(self) -> Path:
        models = "+".join(target.name for target in self.targets)
        strategies = (
            "mask" if self.options.mask else "+".join(text.partition(":")[0] for text in self.options.strategies)
        )
        return Path("results/runs") / f"{self.created:%Y%m%dT%H%M%S}-{models}-{strategies}.json"

    def _record(self) -> dict[str, Any]:
        shared = {
            key: [entry for part in self._shared for entry in part[key]] for key in ("profiles", "tasks", "dense")
        }
        record: dict[str, Any] = {
            "version": records.VERSION,
            "status": "failed" if self.status == "complete" and self.exit_status else self.status,
            "created": self.created.isoformat(timespec="seconds"),
            "command": self.command | {"resolved": _plain(self.options)},
            "seed": self.options.seed,
            "plugins": [
                {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
                for plugin in self.registry.plugins
                if plugin.status == "active"
            ],
            "environment": {"device": self.device, "dtype": self.dtype},
            "models": self._model_records,
            **shared,
            "cases": self.results,
            "comparisons": self._comparisons,
        }
        if self._samples:
            samples = records.write_samples(
                self._samples, self.output.with_name(f"{self.output.name.removesuffix('.json')}.samples.jsonl")
            )
            for entry in [*record["tasks"], *record["cases"]]:
                entry["samples"] = samples
        self.registry.hook.spath_update_record(record=record)
        return record


class LoadedModel:
    """A model in memory, and what its cases share."""

    def __init__(
        self, target: Target, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, session: Session
    ) -> None:
        self.target, self.model, self.tokenizer, self.session = target, model, tokenizer, session
        self.sites: list[Site] = target.architecture.sites(model)
        self.fingerprint = fingerprint(model)
        self.lm = PathwayLM(model, tokenizer, session.options.batch_size)
        if session.options.apply_chat_template and not tokenizer.chat_template:
            raise UsageError(f"{target.reference}: --apply-chat-template was given, but its tokenizer has no template")
        self._corpora: dict[str, Corpus] = {}
        self._passages: dict[str, set[str]] = {}
        self._domain_profiles: dict[str, DomainProfile] = {}
        self._profiles: dict[str, Profile] = {}
        """Those that strategies were given, by fingerprint."""
        self._dense: dict[str, Evaluation] = {}
        self._truncated: dict[str, int] = {}
        self._noise: dict[str, list[dict[str, Any]]] = {}
        self._masks: dict[str, tuple[Mask, dict[str, Any]]] = {}
        self._shared_words: dict[tuple[str, ...], dict[str, float]] = {}
        self.arms: list[Arm] = []
        """What cases have scored, in their order."""
        self.timed: dict[str, str] = {}
        """The case in which a mask's speed was measured."""
        self._preservation: dict[str, Preservation] = {}
        self._neutrality: dict[Execution, Neutrality] = {}
        self.layer_speed: dict[tuple[str, float], dict[str, Any]] = {}
        """Timings of a reference layer, by shape and sparsity: they do not depend on the case."""

    def corpus(self, domain: Domain) -> Corpus:
        """The domain's text: the user's, else the domain's own."""
        if domain.name not in self._corpora:
            own = self.session.corpora.get(domain.name)
            if domain.name == POOLED:
                parts = [self.corpus(one) for one in self.session.domains]
                profile = in_hash_order(text for part in parts for text in part.profile)
                own = Corpus(tuple(profile), (), domain.provenance)
            elif own is None:
                profile, heldout = in_hash_order(domain.texts("profile")), in_hash_order(domain.texts("heldout"))
                if not profile:
                    raise UsageError(f"domain {domain.name!r} has no profile text")
                own = Corpus(tuple(profile), tuple(heldout), domain.provenance or f"domain {domain.name}")
            self._corpora[domain.name] = own
        return self._corpora[domain.name]

    def passages(self, domain: Domain) -> set[str]:
        """Digests of all that stands in the domain's profile text: documents, and runs of their lines."""
        if domain.name not in self._passages:
            found = self._passages[domain.name] = set()
            for document in self.corpus(domain).profile:
                lines = document.splitlines()
                found.add(digest(document))
                for start in range(len(lines)):
                    ends = range(start + 1, min(start + PASSAGE_LINES, len(lines)) + 1)
                    found.update(digest("\n".join(lines[start:end])) for end in ends)
        return self._passages[domain.name]

    def shared_words(
        self, domains: Sequence[Domain], evaluated_on: Domain, items: Mapping[str, Sequence[set[str]]]
    ) -> dict[str, float]:
        """By task, the share of `items` that have 13 words in a row which stand in the domains' profile text."""
        key = (evaluated_on.name, *(domain.name for domain in domains))
        if key not in self._shared_words:
            texts = [text for domain in domains for text in self.corpus(domain).profile]
            found = iter(overlaps(texts, [item for task in items.values() for item in task], SHARED_WORDS))
            self._shared_words[key] = {
                task: sum(next(found) for _ in documents) / len(documents) for task, documents in items.items()
            }
        return self._shared_words[key]

    def profile(self, strategy: Strategy, domain: Domain) -> Profile | None:
        """The profile that the strategy requires for the domain; none where it requires none."""
        if not strategy.requires:
            return None
        reference = [one for one in self.session.registry.domains.values() if strategy.all_domains and one != domain]
        cases = [case for case in self.session.cases if case.model == self.target.name]
        names = sorted({name for case in cases for name in case.strategy.requires})  # one pass serves all cases
        if domain.name == POOLED:
            return self._remember(pooled(self.make_profile(self.session.domains, names), POOLED))
        return self.make_profile([domain, *reference], names)

    def make_profile(self, domains: Sequence[Domain], names: Sequence[str]) -> Profile:
        """The statistics called `names` of each domain. Raises `UsageError` for an unknown one."""
        known = [*STATISTICS, ROUTING]
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"unknown statistic {unknown[0]!r}: there are {', '.join(known)}")
        profile = Profile({domain.name: self._domain_profile(domain, names) for domain in domains}, self.fingerprint)
        return self._remember(profile)

    def _remember(self, profile: Profile) -> Profile:
        return self._profiles.setdefault(profile.fingerprint, profile)

    def select(self, case: Case, context: Context) -> Mask:
        """The mask that the case's static strategy selects, with its provenance."""
        if case.mask_id not in self._masks:
            state = context.generator.get_state()
            mask = case.strategy.select(context)
            context.generator.set_state(state)
            provenance = {
                "model": self.fingerprint,
                "case": case.mask_id,
                "profile": context.profile.fingerprint if context.profile else "none",
            }
            self._masks[case.mask_id] = Mask(mask.keep, provenance, mask.experts), _convergence(case, context)
        return self._masks[case.mask_id][0]

    def convergence(self, case: Case) -> dict[str, Any]:
        """The record's `convergence` of a case whose mask was selected."""
        return self._masks[case.mask_id][1]

    def evaluate(self, domain: Domain) -> Evaluation:
        """The scores on the domain's tasks of the model as it now is."""
        session = self.session
        return evaluate(
            self.lm,
            session.tasks[domain.name],
            session.limits,
            session.options.seed,
            session.options.apply_chat_template,
        )

    def dense(self, domain: Domain) -> Evaluation:
        """The dense model's scores on the domain, in forwards of the size that the last arm needed."""
        known = self._dense.get(domain.name)
        if known is None or known.token_budget != self.lm.token_budget:
            self.lm.truncated = 0
            with self.lm.remembering(self.fingerprint):
                self._dense[domain.name] = self.evaluate(domain)
            self._truncated[domain.name] = self.lm.truncated
            if self.lm.truncated:
                log.warning(
                    "%s: %d requests are longer than the model's %d tokens and lose their beginning",
                    domain.name,
                    self.lm.truncated,
                    self.lm.max_length,
                )
            if self.session.options.noise_floor:
                with self.lm.repacked():
                    self._noise[domain.name] = noise_floor(self._dense[domain.name], self.evaluate(domain))
        return self._dense[domain.name]

    def preservation(self, domain: Domain) -> Preservation:
        """The dense model's outputs on the domain's held-out text. Raises `UsageError` where there is no such text."""
        if domain.name not in self._preservation:
            options = self.session.options
            self._preservation[domain.name] = Preservation(
                self.model,
                self.tokenizer,
                self.corpus(domain).heldout,
                tokens=options.preservation_tokens,
                batch_size=options.batch_size,
            )
        for name, other in self._preservation.items():
            if name != domain.name:
                other.forget()
        return self._preservation[domain.name]

    def probe(self, domain: Domain) -> Batch:
        """A few rows of the domain's text, on which executions are compared."""
        corpus = self.corpus(domain)
        documents = [*corpus.heldout, *corpus.profile]
        return next(batches(self.tokenizer, documents, tokens=PROBE_TOKENS, batch_size=4))

    def neutrality(self, execution: Execution, domain: Domain) -> Neutrality:
        """What keeping all and removing all does, checked once per execution."""
        if execution not in self._neutrality:
            self._neutrality[execution] = check_neutrality(self.model, self.sites, self.probe(domain), execution)
        return self._neutrality[execution]

    def context(self, case: Case) -> Context:
        """What the case's strategy may look at."""
        seed = hashlib.sha256(f"{self.session.options.seed}/{case.mask_id}".encode()).digest()
        device = self.model.device
        calibration: list[Batch] = []
        if case.strategy.needs_batches:
            calibration += batches(
                self.tokenizer,
                self.corpus(case.domain).profile,
                tokens=self.session.options.profile_tokens,
                batch_size=self.session.options.batch_size,
            )
        return Context(
            domain=case.domain.name,
            budget=Budget(case.sparsity, case.expert_sparsity),
            sites={site.path: site for site in self.sites},
            profile=self.profile(case.strategy, case.domain),
            generator=torch.Generator().manual_seed(int.from_bytes(seed[:7], "big")),
            model=self.model,
            batches=tuple(batch.inputs(device) for batch in calibration),
            counted=tuple(batch.counted.to(device) for batch in calibration),
        )

    def record(self) -> dict[str, Any]:
        """The record's entry of the model."""
        ffn = sum(site.weight_bytes(None) for site in self.sites)
        config = self.model.config.get_text_config()
        family, reference = self.target.architecture, self.target.reference
        record = {
            "name": self.target.name,
            "arch": family.name,
            # where this installation keeps its own checkpoints says nothing elsewhere
            "reference": f"the checkpoint of {family.name}" if reference == str(family.checkpoint) else reference,
            "fingerprint": self.fingerprint,
            "parameters": parameter_count(self.model),
            "layers": config.num_hidden_layers,
            "sites": [_without_none({"path": s.path, "width": s.width, "experts": s.experts}) for s in self.sites],
            "ffn_share": ffn / weight_bytes(self.model),
            "quantisation": quantisation(self.model.config),
            "device_map": device_map(self.model),
        }
        options = self.session.options
        return _without_none(record | {"revision": options.revision, "sites_pattern": options.sites})

    def shared_records(self) -> dict[str, list[dict[str, Any]]]:
        """The record's `profiles`, `tasks` and `dense` entries of the model."""
        options = self.session.options
        everything = Profile(self._domain_profiles, self.fingerprint)
        profiles = []
        for profile in [*self._profiles.values(), *([everything] if len(everything.domains) > 1 else [])]:
            entry: dict[str, Any] = {
                "model": self.target.name,
                "fingerprint": profile.fingerprint,
                "domains": list(profile.domains),
                "tokens": {name: part.tokens for name, part in profile.domains.items()},
                "texts": {name: part.source for name, part in profile.domains.items()},
            }
            if len(profile.domains) > 1 and all("mean_abs" in part.statistics for part in profile.domains.values()):
                entry["specialisation"] = specialisation(profile)
            profiles.append(entry)
        profiles = list({entry["fingerprint"]: entry for entry in profiles}.values())
        tasks, dense = [], []
        for domain, evaluation in self._dense.items():
            for task in self.session.tasks[domain].values():
                limit = self.session.limits.of(task.task_name)
                tasks += task_record(task, evaluation, limit, options.batch_size)
            quality = [
                {"task": s.task, "metric": s.metric, "filter": s.filter, **score_record(s)}
                for s in evaluation.scores.values()
            ]
            arm = {"model": self.target.name, "domain": domain, "quality": quality}
            noise = {"noise_floor": self._noise[domain]} if domain in self._noise else {}
            dense.append(arm | {"truncated_requests": self._truncated[domain]} | noise)
        return {"profiles": profiles, "tasks": tasks, "dense": dense}

    def dense_samples(self) -> list[dict[str, Any]]:
        """The dense arm's samples."""
        return [
            {"case": f"{self.target.name}/{domain}/dense", **row}
            for domain, evaluation in self._dense.items()
            for row in [*evaluation.samples, *_heldout_rows(self._preservation.get(domain))]
        ]

    def _domain_profile(self, domain: Domain, names: Sequence[str]) -> DomainProfile:
        if domain.name not in self._domain_profiles:
            options = self.session.options
            settings: dict[str, Any] = {"tokens": options.profile_tokens, "batch_size": options.batch_size}
            corpus = self.corpus(domain)
            self._domain_profiles[domain.name] = cached_profile(
                self.fingerprint,
                self.model,
                domain.name,
                corpus,
                settings
                | {
                    "statistics": list(names),
                    "sites": [site.path for site in self.sites],
                    "tokenizer": tokenizer_digest(self.tokenizer),
                },
                lambda: profile_domain(self.model, self.tokenizer, self.sites, domain.name, corpus, names, **settings),
            )
        return self._domain_profiles[domain.name]


def run_case(case: Case, session: Session) -> dict[str, Any]:
    """The built-in protocol of one case: its part of the record. Raises `GateError` where a gate finds a fault."""
    loaded = session.loaded
    assert loaded is not None
    options = session.options
    context = loaded.context(case)
    disjoint = check_disjoint(loaded, case, options.allow_overlap)
    pathway = make_pathway(loaded, case, context)
    neutrality = loaded.neutrality(pathway.execution, case.evaluated_on)
    gates: dict[str, Any] = {"parity": None, "parity_reason": f"{pathway.execution} execution has nothing to compare"}
    if isinstance(pathway, StaticPathway) and pathway.execution == "compact":
        gates = {"parity": check_parity(loaded.model, pathway, loaded.probe(case.evaluated_on))}
    sparse, exercised = score_sparse(loaded, case, pathway)
    dense = loaded.dense(case.evaluated_on)

    def level(scores: Scores) -> tuple[float | None, str | None]:
        task = session.tasks[case.evaluated_on.name][scores.task]
        return chance(task, scores.metric, session.limits.of(scores.task))

    result: dict[str, Any] = {
        "gates": gates | {"exercised": exercised | dataclasses.asdict(neutrality), "disjoint": disjoint},
        "quality": compare_quality(dense, sparse, level, options.seed),
    }
    if not options.quality:
        result["quality_reason"] = "not asked for"
    result |= describe_mask(loaded, case, pathway, context)
    preserved, heldout = preserve(loaded, case, pathway)
    loaded.arms.append(Arm(case, sparse.scores, result["quality"], heldout))
    session.pathway = pathway
    samples = [*sparse.samples, *_rows(heldout)]
    return result | preserved | {"_samples": samples} | measure_speed(case, session)


def make_pathway(loaded: LoadedModel, case: Case, context: Context) -> Pathway:
    """The pathway of a case's strategy. Raises `UsageError` where the strategy or its mask does not fit the model."""
    if case.strategy.kind == "token":
        return TokenPathway(loaded.sites, case.strategy, context)
    if case.strategy.kind == "prompt":
        if any(site.experts for site in loaded.sites):
            raise UsageError("a prompt strategy is shown activations by token, which routed experts do not have")
        return PromptPathway(loaded.sites, case.strategy, context)
    return StaticPathway(loaded.sites, loaded.select(case, context), case.execution)


def score_sparse(loaded: LoadedModel, case: Case, pathway: Pathway) -> tuple[Evaluation, dict[str, Any]]:
    """The pathway's scores on the very requests of the dense arm, watched; and what the exercise gate saw."""
    exercise = Exercise(loaded.model, pathway)
    loaded.lm.exercise = exercise
    loaded.lm.prompt_pathway = pathway if isinstance(pathway, PromptPathway) else None
    try:
        with pathway.applied(), exercise.watching():
            sparse = loaded.evaluate(case.evaluated_on)
            if isinstance(pathway, PromptPathway):
                pathway.begin()
            _generate_a_little(loaded, case)
    finally:
        loaded.lm.exercise = loaded.lm.prompt_pathway = None
    tasks = loaded.session.tasks[case.evaluated_on.name].values()
    scored = any(task.OUTPUT_TYPE != "generate_until" for task in tasks)
    return sparse, exercise.check(["prefill", "decode"] + ["scoring"] * scored)


def describe_mask(loaded: LoadedModel, case: Case, pathway: Pathway, context: Context) -> dict[str, Any]:
    """The record's `mask`, `sparsity` and `profile` of a case, after it was scored."""
    result: dict[str, Any] = {}
    if context.profile:
        result["profile"] = context.profile.fingerprint
    if isinstance(pathway, StaticPathway):
        removed = sum(site.weight_bytes(None) - site.weight_bytes(pathway.mask) for site in loaded.sites)
        ffn = sum(site.weight_bytes(None) for site in loaded.sites)
        total = weight_bytes(loaded.model)
        digest_and_path: dict[str, Any] = {"digest": pathway.mask.digest}
        if isinstance(case.strategy, GivenMask):
            digest_and_path["path"] = case.strategy.file
        return (
            result
            | loaded.convergence(case)
            | {
                "mask": digest_and_path,
                "sparsity": {
                    "requested": case.sparsity,
                    "achieved": pathway.mask.achieved,
                    "per_site": pathway.mask.per_site,
                    "ffn_weights_removed": removed / ffn,
                    "model_weights_removed": removed / total,
                    **({"experts_requested": case.expert_sparsity} if case.expert_sparsity else {}),
                },
            }
        )
    assert isinstance(pathway, TokenPathway | PromptPathway)
    return result | {
        "mask": None,
        "mask_reason": f"a strategy of kind {case.strategy.kind} has no fixed mask",
        "sparsity": {
            "requested": case.sparsity,
            "achieved": pathway.achieved,
            "per_site": {},
            "ffn_weights_removed": 0.0,
            "model_weights_removed": 0.0,
        },
    }


def preserve(loaded: LoadedModel, case: Case, pathway: Pathway) -> tuple[dict[str, Any], Mapping[str, Nats]]:
    """The record's `preservation` of a case, or the reason why there is none; and what each held-out document lost."""
    if isinstance(pathway, PromptPathway):
        reason = "a prompt strategy has no mask for text without a prompt"
        return {"preservation": None, "preservation_reason": reason}, {}
    try:
        preservation = loaded.preservation(case.evaluated_on)
    except UsageError as error:
        return {"preservation": None, "preservation_reason": str(error)}, {}
    record, heldout = preservation.measure(pathway, seed=loaded.session.options.seed)
    return {"preservation": record}, heldout


UNSKIPPED = {"token": "the kernels that skip token by token need [kernels], a CUDA device and FFNs without experts"}
"""By kind of strategy, why its speed was not measured where nothing skips."""


def measure_speed(case: Case, session: Session) -> dict[str, Any]:
    """The record's `speed` of a case, or the reason why it was not measured."""
    if not session.options.speed:
        return {"speed": [], "speed_reason": "not asked for"}
    loaded = session.loaded
    assert loaded is not None
    if (timed := loaded.timed.setdefault(case.mask_id, case.id)) != case.id:
        return {"speed": [], "speed_reason": f"the same pathway as in {timed}"}
    entries = session.registry.hook.spath_measure_speed(case=case, session=session)
    if not entries:
        missing = UNSKIPPED.get(case.strategy.kind, "there is no compact execution")
        return {"speed": [], "speed_reason": f"not measured: masking is not skipping, and {missing}"}
    return {"speed": entries}


def check_disjoint(loaded: LoadedModel, case: Case, allowed: bool) -> dict[str, Any]:
    """Which share of each task's documents stands in the calibration text, as a document or as lines of one; and which
    share has 13 words in a row that stand there.

    Raises `GateError` where there is any of the former, or more of the latter than chance explains, unless that is
    allowed.
    """
    session = loaded.session
    domains: Sequence[Domain] = []
    if case.strategy.requires or case.strategy.needs_batches:
        everything = session.domains if case.domain.name == POOLED else list(session.registry.domains.values())
        domains = everything if case.strategy.all_domains or case.domain.name == POOLED else [case.domain]
    items = item_texts(loaded.dense(case.evaluated_on), session.tasks[case.evaluated_on.name])
    known = set().union(*(loaded.passages(domain) for domain in domains))
    overlap = {
        task: sum(any(digest(text) in known for text in texts) for texts in documents) / len(documents)
        for task, documents in items.items()
    }
    ngrams = loaded.shared_words(domains, case.evaluated_on, items)
    whole = [f"{share:.1%} of {task}" for task, share in overlap.items() if share]
    parts = [
        f"{share:.1%} of {task}"
        for task, share in ngrams.items()
        if share > max(OVERLAP_LIMIT, 1 / len(items[task])) and not overlap[task]
    ]
    found = [f"holds {', '.join(whole)}"] * bool(whole)
    found += [f"shares {SHARED_WORDS} words in a row with {', '.join(parts)}"] * bool(parts)
    if found and not allowed:
        raise GateError(
            f"the profile text {' and '.join(found)}: calibration and evaluation overlap (--allow-overlap accepts it)"
        )
    return {"ok": not found, "overlap": overlap, "ngrams": ngrams, "allowed": allowed}


def _generate_a_little(loaded: LoadedModel, case: Case) -> None:
    """Prefill and two steps of decoding: the phases whose speed is measured must have been seen with the mask."""
    batch = loaded.probe(case.evaluated_on)
    row = batch.input_ids[:1][:, batch.attention_mask[0].bool()].to(loaded.model.device)
    generate = cast(Callable[..., Any], loaded.model.generate)
    generate(row, attention_mask=torch.ones_like(row), max_new_tokens=3, min_new_tokens=3, do_sample=False)


def _convergence(case: Case, context: Context) -> dict[str, Any]:
    """The record's `convergence` of a mask: how far two halves of the profile text agree on it."""
    if context.profile is None or case.strategy.needs_batches:
        reason = (
            "the strategy reads no profile" if context.profile is None else "the strategy reads more than a profile"
        )
        return {"convergence": None, "convergence_reason": reason}
    try:
        halves = [context.profile.half(index) for index in (0, 1)]
    except UsageError as error:
        return {"convergence": None, "convergence_reason": str(error)}
    masks = []
    for half in halves:
        generator = torch.Generator()
        generator.set_state(context.generator.get_state())  # so that chance is the same in both
        masks.append(case.strategy.select(dataclasses.replace(context, profile=half, generator=generator)))
    agreement = jaccard(*masks)
    if agreement < CONVERGED:
        log.warning(
            "%s: two halves of the profile text agree on %.0f%% of the neurons that either removes: profile more text",
            case.mask_id,
            100 * agreement,
        )
    return {"convergence": {"jaccard": agreement, "threshold": CONVERGED}}


def _rows(heldout: Mapping[str, Nats]) -> list[dict[str, Any]]:
    """The samples of held-out documents."""
    return [{"heldout": key, "nats": nats, "tokens": tokens} for key, (nats, tokens) in heldout.items()]


def _heldout_rows(preservation: Preservation | None) -> list[dict[str, Any]]:
    return _rows(preservation.dense_nats) if preservation else []


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _plain(options: Options) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(options), default=str)))


def run(registry: Registry | None = None, **options: Any) -> dict[str, Any]:
    """Run what `Options(**options)` asks for and return the record. Raises `UsageError` for what cannot be run."""
    return Session(Options(**options), registry or Registry.load()).run()
