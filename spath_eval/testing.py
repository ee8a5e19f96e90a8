"""Checks for plugin authors: what the documentation promises of strategies, architectures, domains and reports.

Each check takes the object that a plugin registers and raises an `AssertionError` that says what to mend. Models are
tiny and randomly initialised, of the real transformers classes, so that a check takes seconds and needs no network.
What is measured on them are the gates of a run. Nothing heavy is imported before a check is called.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

import click

from spath_eval.contracts import Architecture, Budget, Context, Domain, Report, Strategy, UsageError
from spath_eval.registry import Refused, Registry, check_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from spath_eval.masks import Mask
    from spath_eval.profiling import Profile
    from spath_eval.sites import Site
    from spath_eval.texts import Batch

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""The configuration of a tiny model. Weights are larger than usual, so that differences are not lost in rounding."""

EXPERTS = {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}
SHAPES: Mapping[str, Mapping[str, Any]] = {"llama": {}, "phi": {"num_key_value_heads": 2}, "mixtral": EXPERTS}
"""The models that strategies are tried on (FFNs with a gate, without one, and routed experts): their model types, and
what their configurations have besides `SIZES`."""

LARGEST = 20_000_000
"""Weights beyond which a model is not tiny."""
TOKENS = 400
"""Tokens of an example domain that are profiled."""
TOKEN_SLACK = 0.1
"""How far from the budget a strategy of kind `token` may be on its own calibration text."""
WIDTHS = (60, 80, 100)
"""Columns that a report is asked for: of a terminal, `spath-eval` asks for 60 to 100."""

Result = TypeVar("Result")


# Strategies


def check_strategy(strategy: type[Strategy]) -> None:
    """Check the class that a plugin registers as a strategy.

    It can be registered, `requires` statistics that there are, and the command line can spell its options. On FFNs with
    a gate, without one and of routed experts, with the default options and each other value of a `bool` or `Literal`:
    equal contexts give equal answers, in the promised form; the budget is met to the whole neuron (controls may remove
    less; kind `token` within a tenth on its calibration text); the model, the profile and the batches are left as they
    were. A `UsageError` refuses a kind of FFN; one has to be accepted.
    """
    _check_registrable("strategy", strategy)
    _check_requires(strategy)
    check = _check_tokens if strategy.kind == "token" else _check_masks
    shapes = [shape for shape in SHAPES if strategy.kind != "prompt" or SHAPES[shape] is not EXPERTS]
    benches = {shape: _Bench.of(shape) for shape in shapes}
    for variant in _variants(strategy):
        refusals = []
        for shape, bench in benches.items():
            try:
                check(variant, bench)
            except UsageError as error:
                refusals.append(f"{shape}: {error}")
        _require(
            len(refusals) < len(benches),
            f"{_label(variant)} refuses every kind of FFN, and must accept one: {'; '.join(refusals)}",
        )


def example_context(
    strategy: Strategy, *, sparsity: float = 0.5, shape: Literal["llama", "phi", "mixtral"] = "llama"
) -> Context:
    """What a run would hand to `strategy`, of a tiny model with FFNs of that shape: for tests of a plugin's own.

    The model has three layers, and the profile holds what the strategy `requires`, over a few made-up sentences.
    """
    return _Bench.of(shape).context(strategy, Budget(sparsity))


class _Bench:
    """A tiny model, and the texts and statistics of example domains."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.sites, self.tokenizer = model, sites, tokenizer
        self._profiles: dict[tuple[str, ...], Profile] = {}

    @classmethod
    def of(cls, shape: str) -> _Bench:
        from transformers import AutoTokenizer

        from spath_eval.models import find_architecture
        from spath_eval.plugins import zoo

        tokenizer = AutoTokenizer.from_pretrained(Path(zoo.__file__).with_name("tokenizer"))
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
        model = tiny_model(shape, {**SIZES, **SHAPES[shape], **special, "vocab_size": len(tokenizer)})
        family = find_architecture(Registry.load(), model.config, "auto")
        return cls(model, family.sites(model), tokenizer)

    def context(self, strategy: Strategy, budget: Budget) -> Context:
        """What the strategy is handed; the same each time, its generator included."""
        import torch

        domain, *others = _DOCUMENTS
        batches = self.batches(domain) if strategy.needs_batches else []
        return Context(
            domain=domain,
            budget=budget,
            sites={site.path: site for site in self.sites},
            profile=self._profile([domain, *others] if strategy.all_domains else [domain], strategy.requires),
            generator=torch.Generator().manual_seed(0),
            model=self.model,
            batches=tuple(batch.inputs(self.model.device) for batch in batches),
            counted=tuple(batch.counted for batch in batches),
        )

    def batches(self, domain: str) -> list[Batch]:
        """The domain's text as calibration batches."""
        from spath_eval.texts import batches

        return list(batches(self.tokenizer, _DOCUMENTS[domain], tokens=TOKENS, batch_size=8))

    def prompt_activations(self) -> dict[str, torch.Tensor]:
        """What enters the down projections over one document, but for BOS, `[tokens, width]`."""
        import torch

        from spath_eval.profiling import forward_backbone
        from spath_eval.texts import batches

        (batch,) = batches(self.tokenizer, next(iter(_DOCUMENTS.values()))[:1], tokens=TOKENS, batch_size=1)
        found: dict[str, torch.Tensor] = {}
        with torch.inference_mode(), ExitStack() as stack:
            for site in self.sites:
                receive = lambda seen, path=site.path: found.update({path: seen.values[batch.counted[0]]})  # noqa: E731
                stack.enter_context(site.observe(receive))
            forward_backbone(self.model, batch)
        return found

    @contextmanager
    def unchanged(self, label: str, context: Context) -> Iterator[None]:
        """Within the context, what the strategy is handed stays as it is."""
        before = self._state(context)
        yield
        for what, value in self._state(context).items():
            _require(
                value == before[what], f"{label} changes {what}: work on copies, and undo what is done to the model"
            )

    def _state(self, context: Context) -> dict[str, Any]:
        from spath_eval.models import fingerprint

        modules = dict(self.model.named_modules())
        weights = list(self.model.parameters())
        return {
            "the model's weights": fingerprint(self.model),
            "the model's modules": {path: id(module) for path, module in modules.items()},
            "the model's hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()],
            "the model's training mode": [module.training for module in modules.values()],
            "which weights have gradients": [(weight.requires_grad, weight.grad is None) for weight in weights],
            "the profile": context.profile and context.profile.fingerprint,
            "the sites": list(context.sites),
            "the batches": [{name: values.tolist() for name, values in batch.items()} for batch in context.batches],
        }

    def _profile(self, domains: Sequence[str], names: Sequence[str]) -> Profile | None:
        from spath_eval.profiling import Profile, profile_domain
        from spath_eval.texts import Corpus

        if not names:
            return None
        if tuple(domains) not in self._profiles:
            parts = {
                domain: profile_domain(
                    self.model,
                    self.tokenizer,
                    self.sites,
                    domain,
                    Corpus(_DOCUMENTS[domain], (), "made up"),
                    names,
                    tokens=TOKENS,
                    batch_size=8,
                )
                for domain in domains
            }
            self._profiles[tuple(domains)] = Profile(parts, "tiny")
        return self._profiles[tuple(domains)]


_DOCUMENTS: Mapping[str, tuple[str, ...]] = {
    "sums": tuple(f"{a} plus {b} is {a + b}. {a} times {b} is {a * b}." for a in range(2, 6) for b in range(3, 9)),
    "code": tuple(f"def scale_{n}(values):\n    return [{n} * value for value in values]" for n in range(20)),
    "colours": tuple(
        f"The {colour} {thing} lies on the table." for colour in ("red", "green", "blue") for thing in ("cup", "hat")
    ),
}


def _check_requires(strategy: type[Strategy]) -> None:
    from spath_eval.profiling import ROUTING, STATISTICS

    label = f"strategy {strategy.name!r}"
    known = [*STATISTICS, ROUTING]
    _require(
        isinstance(strategy.requires, tuple) and all(name in known for name in strategy.requires),
        f"{label}: `requires` is {strategy.requires!r}; it must be a tuple of statistics: {', '.join(known)}",
    )


def _variants(strategy: type[Strategy]) -> list[Strategy]:
    """The strategy with its default options, and with each other value of an option that has few of them.

    Fails where one is not what the command line makes of its name.
    """
    from spath_eval.collection import spell

    label = f"strategy {strategy.name!r}"
    with _failing_as(f"{label} cannot be made without options"):
        default = strategy()
    annotations = get_type_hints(strategy)
    variants = [default]
    for option in dataclasses.fields(strategy):
        _require(
            option.default is not dataclasses.MISSING,
            f"{label}: option {option.name} needs a plain default, by which it is left out of a case's id",
        )
        annotation = annotations[option.name]
        values = (False, True) if annotation is bool else get_args(annotation)
        with _failing_as(f"{label}: option {option.name}"):
            variants += [strategy(**{option.name: value}) for value in values if value != option.default]
    registry = Registry()
    registry.strategies[strategy.name] = strategy
    for variant in variants:
        given = ",".join(f"{option.name}={getattr(variant, option.name)}" for option in dataclasses.fields(strategy))
        for text in (spell(variant), f"{strategy.name}:{given}" if given else strategy.name):
            with _failing_as(label):
                made = registry.parse_strategy(text)
            _require(
                made == variant,
                f"{label}: on the command line {text!r} makes {made}, not {variant}: an option's text cannot hold a "
                "comma or a colon, and __post_init__ may refuse options but not change them",
            )
    return variants


def _check_masks(strategy: Strategy, bench: _Bench) -> None:
    """Kinds `static` and `prompt`."""
    name, arguments = ("select", ()) if strategy.kind == "static" else ("select_prompt", (bench.prompt_activations(),))
    budgets = [Budget(0.25), Budget(0.5)]
    if strategy.kind == "static" and any(site.experts for site in bench.sites):
        budgets.append(Budget(0.0, expert_sparsity=0.25))
    for budget in budgets:
        label = f"{_label(strategy)}: {name} for {_described(budget)} of a tiny {bench.model.config.model_type}"
        digests = set()
        for _ in range(2):
            context = bench.context(strategy, budget)
            with bench.unchanged(label, context):
                mask = _called(label, getattr(strategy, name), context, *arguments)
            _check_mask(label, mask, strategy, bench.sites, budget)
            digests.add(mask.digest)
        _require(
            len(digests) == 1,
            f"{label} gives two masks for equal contexts: draw random numbers with generator=context.generator, and "
            "keep no state between calls",
        )
        profile = context.profile
        if strategy.kind == "static" and profile is not None and not strategy.needs_batches:
            for half in (0, 1):
                context = dataclasses.replace(bench.context(strategy, budget), profile=profile.half(half))
                about = f"{label}, from the profile of half the text"
                mask = _called(about, strategy.select, context)
                _check_mask(about, mask, strategy, bench.sites, budget)


def _check_mask(label: str, mask: Mask, strategy: Strategy, sites: Sequence[Site], budget: Budget) -> None:
    from spath_eval import masks

    _require(
        isinstance(mask, masks.Mask),
        f"{label} returns a {type(mask).__name__}, not a spath_eval.Mask: remove_lowest(scores, sparsity) makes one",
    )
    with _failing_as(label):
        mask.check(sites)
    removed, neurons, groups = 0, 0, 0
    for site in sites:
        chosen = mask.experts.get(site.path)
        if chosen is not None:
            _require(
                int((~chosen).sum()) <= round(budget.expert_sparsity * len(chosen)),
                f"{label} removes {int((~chosen).sum())} of {len(chosen)} experts at {site.path}: remove no more than "
                "context.budget.expert_sparsity of them",
            )
        kept = mask[site.path] if chosen is None else mask[site.path][chosen]
        removed += int((~kept).sum())
        neurons += kept.numel()
        groups += kept.numel() // site.width
    _check_share(label, removed, neurons, groups / 2, strategy, budget)


def _check_share(label: str, removed: int, total: int, slack: float, strategy: Strategy, budget: Budget) -> None:
    asked = budget.sparsity * total
    share = f"{label} removes {removed / total:.3f} of the neurons"
    _require(removed <= asked + slack, f"{share}, more than context.budget.sparsity allows")
    _require(
        removed >= asked - slack or strategy.control,
        f"{share}, less than context.budget.sparsity asks for: strategies are compared at equal sparsity. (One that is "
        "no rival but a check sets `control = True`.)",
    )


def _check_tokens(strategy: Strategy, bench: _Bench) -> None:
    """Kind `token`."""
    import torch

    for budget in (Budget(0.25), Budget(0.5)):
        label = f"{_label(strategy)}: keep for {_described(budget)} of a tiny {bench.model.config.model_type}"
        context = bench.context(strategy, budget)
        with bench.unchanged(label, context):
            first = _decisions(label, strategy, context, bench)
        second = _decisions(label, strategy, bench.context(strategy, budget), bench)
        _require(
            all(map(torch.equal, first, second)),
            f"{label} decides otherwise for equal contexts: draw random numbers with generator=context.generator, and "
            "keep no state between calls but what prepare returns",
        )
        total = sum(kept.numel() for kept in first)
        removed = total - sum(int(kept.sum()) for kept in first)
        _check_share(label, removed, total, TOKEN_SLACK * total, strategy, budget)


def _decisions(label: str, strategy: Strategy, context: Context, bench: _Bench) -> list[torch.Tensor]:
    """What `keep` decides for the tokens of the calibration text, call by call, while the model runs dense."""
    import torch

    from spath_eval.profiling import forward_backbone

    context = dataclasses.replace(context, prepared=_called(label, strategy.prepare, context))
    decisions: list[torch.Tensor] = []
    counted = torch.empty(0)

    def keep_at(site: Site) -> Callable[[torch.Tensor | None, torch.Tensor], None]:
        def keep(gate: torch.Tensor | None, product: torch.Tensor) -> None:
            handed = [values for values in (gate, product) if values is not None]
            copies = [values.clone() for values in handed]
            kept = _called(label, strategy.keep, context, site, gate, product)
            _require(
                isinstance(kept, torch.Tensor) and (kept.dtype, kept.shape) == (torch.bool, product.shape),
                f"{label} must return a boolean tensor of the shape {list(product.shape)} of `product`, and returns "
                f"{_tensor(kept)}",
            )
            _require(all(map(torch.equal, handed, copies)), f"{label} changes the activations it is handed: copy them")
            if not strategy.reads_product:
                again = _called(label, strategy.keep, context, site, gate, product.to("meta"))
                _require(
                    again.device == kept.device and torch.equal(again, kept),
                    f"{label} reads `product`, although `reads_product` is false",
                )
            decisions.append(kept[counted] if site.experts is None else kept)

        return keep

    with torch.inference_mode(), ExitStack() as stack:
        for site in bench.sites:
            stack.enter_context(site.filtered(keep_at(site)))
        for batch in bench.batches(context.domain):
            counted = batch.counted.flatten()
            forward_backbone(bench.model, batch)
    return decisions


def _called(label: str, method: Callable[..., Result], context: Context, *arguments: Any) -> Result:
    """What a strategy's method returns. A `UsageError` is the strategy's own, any other error a failure."""
    try:
        return method(context, *arguments)
    except UsageError:
        raise
    except Exception as error:
        unprofiled = context.profile is None and "NoneType" in str(error)
        hint = " (`requires` names no statistic, so that there is no context.profile)" if unprofiled else ""
        raise AssertionError(f"{label} raises {type(error).__name__}: {error}{hint}") from error


def _label(strategy: Strategy) -> str:
    from spath_eval.collection import spell

    return f"strategy {spell(strategy)!r}"


def _described(budget: Budget) -> str:
    experts = f" and {budget.expert_sparsity:g} of the experts" if budget.expert_sparsity else ""
    return f"{budget.sparsity:g} of the neurons{experts}"


def _tensor(value: object) -> str:
    import torch

    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


# Architectures


def check_architecture(architecture: Architecture, sizes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Check the family that a plugin registers, on a tiny randomly initialised model of each model type it claims.

    `sizes` maps a model type to the keyword arguments of its configuration, where `SIZES` do not make a tiny model of
    it: `{"mixtral": {**SIZES, "num_local_experts": 8}}`.

    Of each: the family claims it; every layer has an FFN site; keeping all neurons changes the logits by exactly 0 and
    removing all changes them, masked and compact; compact equals masked at every site; the mask is seen at every site
    in scoring, prefill and decode. Reference shapes and the checkpoint are the family's, and have sites.
    """
    import transformers

    _check_registrable("architecture", architecture)
    label = f"architecture {architecture.name!r}"
    sizes = sizes or {}
    unknown = sorted(sizes.keys() - set(architecture.model_types))
    _require(not unknown, f"{label}: sizes are given for {', '.join(unknown)}, which it does not claim")
    _require(
        isinstance(architecture.model_types, tuple) and bool(architecture.model_types),
        f"{label}: `model_types` is {architecture.model_types!r}; it must be a tuple of what `model_type` is in the "
        "config.json of its models",
    )
    for model_type in architecture.model_types:
        about = f"{label}, model type {model_type!r}"
        _require(
            model_type in transformers.CONFIG_MAPPING,
            f"{about}: transformers {transformers.__version__} knows no such type",
        )
        with _failing_as(f"{about}: no tiny model can be made (give check_architecture `sizes` for it)"):
            model = tiny_model(
                model_type, sizes.get(model_type, SIZES), architecture.auto_classes.get(model_type, _AUTO_CLASS)
            )
        _check_family(about, architecture, model)
    for shape in architecture.reference_shapes:
        _check_declared(f"{label}, reference shape {shape.name!r}", architecture, _config(dict(shape.config)))
    if architecture.checkpoint is not None:
        from spath_eval.models import read_config

        with _failing_as(f"{label}: its checkpoint"):
            config = read_config(str(architecture.checkpoint))
        _check_declared(f"{label}, checkpoint {architecture.checkpoint.name!r}", architecture, config)


_AUTO_CLASS = "AutoModelForCausalLM"


def tiny_model(model_type: str, sizes: Mapping[str, Any] = SIZES, auto_class: str = _AUTO_CLASS) -> PreTrainedModel:
    """A randomly initialised model of a type, always the same one, for tests: biases are random too.

    `sizes` are the keyword arguments of its configuration. Raises `ValueError` where they do not make it tiny.
    """
    import torch
    import transformers

    config = _config({"model_type": model_type, **sizes})
    weights = sum(weight.numel() for weight in _without_weights(config, auto_class).parameters())
    if weights > LARGEST:
        raise ValueError(f"a {model_type} of these sizes has {weights:,} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config).eval().requires_grad_(False)
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                values.normal_(std=0.2)
    return model


def _config(sizes: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(sizes.pop("model_type"), **copy.deepcopy(sizes))


def _without_weights(config: PreTrainedConfig, auto_class: str) -> PreTrainedModel:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def _check_declared(label: str, architecture: Architecture, config: PreTrainedConfig) -> None:
    """A model that the family itself names is its own, and has FFN sites."""
    _require(architecture.matches(config), f"{label} is of model type {config.model_type!r}, which it does not claim")
    auto_class = architecture.auto_classes.get(config.model_type, _AUTO_CLASS)
    with _failing_as(label):
        architecture.sites(_without_weights(config, auto_class))


def _check_family(label: str, architecture: Architecture, model: PreTrainedModel) -> None:
    """The gates of a run."""
    import torch

    from spath_eval.masks import remove_experts, remove_lowest
    from spath_eval.pathways import Execution, StaticPathway, check_neutrality, check_parity

    _require(architecture.matches(model.config), f"{label}: matches() is false for a configuration of that type")
    with _failing_as(label):
        sites = architecture.sites(model)
    decoder = model.get_decoder()
    (path,) = (path for path, module in model.named_modules() if module is decoder)
    for number in range(len(getattr(decoder, "layers", ()))):
        layer = f"{path}.layers.{number}."
        _require(
            any(f"{site.path}.".startswith(layer) for site in sites),
            f"{label}: no FFN site lies in {layer[:-1]}, so that it would stay dense: add an FFN for it. (If such "
            "layers have none by design, give check_architecture `sizes` without them.)",
        )
    generator = torch.Generator().manual_seed(0)
    mask = remove_lowest({site.path: torch.rand(site.shape, generator=generator) for site in sites}, 0.5)
    if routed := {site.path: torch.rand(site.experts, generator=generator) for site in sites if site.experts}:
        mask = remove_experts(mask, routed, 0.25)
    probe = _probe(model.config.get_text_config().vocab_size)
    executions: tuple[Execution, ...] = ("masked", "compact")
    for execution in executions:
        with _failing_as(f"{label}, {execution}"):
            check_neutrality(model, sites, probe, execution)
            pathway = StaticPathway(sites, mask, execution)
            if execution == "compact":
                check_parity(model, pathway, probe)
            _exercise(model, pathway, probe)


def _exercise(model: PreTrainedModel, pathway: Any, probe: Batch) -> None:
    """Raises `GateError` where the mask is not seen at every site while the model scores, prefills and decodes."""
    import torch

    from spath_eval.pathways import Exercise
    from spath_eval.profiling import forward_backbone

    exercise = Exercise(model, pathway)
    row = probe.input_ids[:1]
    generate: Any = model.generate
    with torch.inference_mode(), pathway.applied(), exercise.watching():
        exercise.scoring = True
        forward_backbone(model, probe)
        exercise.scoring = False
        generate(row, attention_mask=torch.ones_like(row), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    exercise.check(("scoring", "prefill", "decode"))


def _probe(vocabulary: int) -> Batch:
    import torch

    from spath_eval.texts import Batch

    tokens = torch.randint(3, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(tokens)
    return Batch(tokens, everything, everything.bool(), (0, 1))


# Domains


def check_domain(domain: Domain) -> None:
    """Check the domain that a plugin registers.

    The splits `profile` and `heldout` hold documents, the same ones each time, none of them empty and none in both;
    provenance and licence are told; tasks exist; and the items of those in its own `task_paths`, which are loaded,
    stand in neither split. Of lm-eval's own tasks no rows are fetched.
    """
    from spath_eval.quality.benchmarks import task_manager
    from spath_eval.texts import digest

    _check_registrable("domain", domain)
    label = f"domain {domain.name!r}"
    texts = {split: _documents(label, domain, split) for split in ("profile", "heldout")}
    heldout = {digest(text) for text in texts["heldout"]}
    both = [text for text in texts["profile"] if digest(text) in heldout]
    _require(
        not both,
        f"{label}: {len(both)} documents are in profile and in heldout, such as {_shortened(both)}: outputs would be "
        "compared on the text that neurons are chosen by",
    )
    for name in ("provenance", "licence"):
        _require(bool(getattr(domain, name).strip()), f"{label}: say its {name}, of texts and items")
    _require(bool(domain.tasks), f"{label} has no tasks: name those of lm-eval, or your own in task_paths")
    with _failing_as(label):
        task_manager([*domain.tasks, *domain.benchmarks], sorted(map(str, domain.task_paths)))
    _check_items(label, domain, [*texts["profile"], *texts["heldout"]])


def _documents(label: str, domain: Domain, split: str) -> list[str]:
    with _failing_as(f"{label}: texts({split!r})"):
        texts, again = domain.texts(split), domain.texts(split)
    _require(
        isinstance(texts, Sequence) and not isinstance(texts, str),
        f"{label}: texts({split!r}) must return a list of documents, and returns a {type(texts).__name__}",
    )
    _require(bool(texts), f"{label}: texts({split!r}) has no document")
    for number, text in enumerate(texts):
        _require(
            isinstance(text, str) and bool(text.strip()),
            f"{label}: document {number} of texts({split!r}) is {'empty' if text == '' else repr(text)}",
        )
    _require(
        list(texts) == list(again),
        f"{label}: texts({split!r}) differs from one call to the next: seed what is random, and sort what has no order",
    )
    return list(texts)


def _check_items(label: str, domain: Domain, texts: Sequence[str]) -> None:
    """The items of the domain's own tasks stand in none of its texts. No model is needed to know the items."""
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    from spath_eval.collection import Limits
    from spath_eval.quality.adapter import evaluate, item_texts
    from spath_eval.quality.benchmarks import load_tasks
    from spath_eval.quality.overlap import overlaps
    from spath_eval.session import OVERLAP_LIMIT, SHARED_WORDS

    if not domain.task_paths:
        return
    known = TaskManager(include_path=sorted(map(str, domain.task_paths)), include_defaults=False).task_index
    lm: Any = DummyLM()
    lm.token_budget = 0
    with _failing_as(label):
        tasks = load_tasks([name for name in domain.tasks if name in known], domain.task_paths)
        items = item_texts(evaluate(lm, tasks, Limits(), seed=0), tasks)
    for task, documents in items.items():
        found = [
            item for item, shared in zip(documents, overlaps(texts, documents, SHARED_WORDS), strict=True) if shared
        ]
        _require(
            len(found) <= max(1, OVERLAP_LIMIT * len(documents)),
            f"{label}: {len(found)} of {len(documents)} items of {task} share {SHARED_WORDS} words in a row with its "
            f"texts, or stand there whole, such as {_shortened([max(item, key=len) for item in found])}",
        )


def _shortened(texts: Sequence[str]) -> str:
    return repr(texts[0] if len(texts[0]) <= 60 else f"{texts[0][:57]}...") if texts else ""


# Reports


def example_record() -> dict[str, Any]:
    """A small record, made up: two cases with results, one that failed and one that errored."""
    return json.loads(Path(__file__).with_name("example_record.json").read_text(encoding="utf-8"))


def check_report(report: Report, *, for_terminal: bool = True) -> None:
    """Check the object that a plugin registers as a report, on `example_record()` and on a record without cases.

    It renders them as text, the same each time, and leaves the record as it was; without `colour` there is no escape
    code; and the text is lines that end with a line end, none of them wider than asked for, which a format of files
    need not care for: `for_terminal=False`.
    """
    _check_registrable("report", report)
    label = f"report {report.name!r}"
    interrupted = {**example_record(), "status": "interrupted", "cases": []}
    for what, record in (("the example record", example_record()), ("a record without cases", interrupted)):
        for width in WIDTHS:
            for colour in (False, True):
                about = f"{label}: render of {what} with width={width} and colour={colour}"
                before = copy.deepcopy(record)
                with _failing_as(about):
                    text, again = (report.render(record, width=width, colour=colour) for _ in range(2))
                _require(isinstance(text, str), f"{about} must return a string, and returns a {type(text).__name__}")
                _require(record == before, f"{about} changes the record: work on a copy")
                _require(text == again, f"{about} differs from one call to the next")
                _require(colour or "\x1b" not in text, f"{about} has escape codes: they are for colour=True")
                if not for_terminal:
                    continue
                _require(text[-1:] in ("", "\n"), f"{about} does not end with a line end")
                widest = max(click.unstyle(text).splitlines(), key=len, default="")
                _require(
                    len(widest) <= width,
                    f"{about} has a line of {len(widest)} columns: {_shortened([widest])}. (A format of files may: "
                    "check_report(..., for_terminal=False).)",
                )


# What all checks share


def _check_registrable(kind: str, offered: object) -> None:
    try:
        check_object(kind, offered)
    except Refused as error:
        raise AssertionError(str(error)) from None


def _require(holds: bool, message: str) -> None:
    """An assertion that is checked under `python -O` too."""
    if not holds:
        raise AssertionError(message)


@contextmanager
def _failing_as(label: str) -> Iterator[None]:
    """Whatever is raised within the context becomes a failure that begins with `label`."""
    try:
        yield
    except AssertionError:
        raise
    except UsageError as error:
        raise AssertionError(f"{label}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
