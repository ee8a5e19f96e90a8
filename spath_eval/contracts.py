"""What a plugin hands over: architectures, domains, strategies and reports.

Everything here is declarative and free of torch, so that importing a plugin costs nothing. What the declarations
lead to (sites, profiles, masks) lives in the modules named in the annotations and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from spath_eval.masks import Mask
    from spath_eval.profiling import Profile
    from spath_eval.sites import Site

CONTRACT_VERSION = 1
"""Version of the plugin contract: the hooks, and the classes of this module. It grows when either breaks a plugin."""


class UsageError(Exception):
    """A mistake of the user: shown as one line without a traceback, and the program exits with status 4."""


@dataclass(frozen=True)
class FFN:
    """Where a family's feed-forward blocks stand in the module tree, and which shape they have."""

    pattern: str
    """Dotted module path of the blocks; `*` stands for exactly one component, e.g. `model.layers.*.mlp`."""
    shape: str = "gated"
    """Name of a shape in `spath_eval.sites.SHAPES`."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    router: str = "gate"
    """Of routed experts: the module beside them that chooses among them."""
    routes_by_logits: bool = False
    """Whether the router selects and weighs by its logits in one, rather than by a `topk` of scores."""
    model_types: tuple[str, ...] = ()
    """The model types it is for, where the types of a family differ."""
    couples_neurons: str | None = None
    """Attribute of the block that is true where its activation function looks at all gate outputs together."""


@dataclass(frozen=True)
class ReferenceShape:
    """A published model's dimensions, for timing with random weights what nobody has to download."""

    name: str
    config: Mapping[str, Any]
    """Keyword arguments of `transformers.AutoConfig.for_model`, `model_type` included."""


@dataclass(frozen=True)
class Architecture:
    """A family of transformer models: how to recognise it, and where its FFNs stand."""

    name: str
    model_types: tuple[str, ...]
    """Values of `config.model_type` this family claims."""
    ffns: tuple[FFN, ...]
    auto_classes: Mapping[str, str] = field(default_factory=dict)
    """The transformers auto class that loads a model type, where it is not `AutoModelForCausalLM`."""
    checkpoint: Path | None = None
    """Folder of a small trained checkpoint, used by `--arch NAME` without `--model`."""
    reference_shapes: tuple[ReferenceShape, ...] = ()

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether this family claims a model of that configuration."""
        return config.model_type in self.model_types

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The FFN sites of `model`, in module order. Raises `UsageError` where none is found."""
        from spath_eval.sites import find_sites

        return find_sites(model, self.ffns)


@dataclass(frozen=True)
class Domain:
    """A field of knowledge: text to profile on, and lm-eval tasks to evaluate on."""

    name: str
    texts: Callable[[str], Sequence[str]]
    """Documents of a split: `profile` for calibration, `heldout` for output preservation, disjoint from each other
    and from the tasks' items. (The project's own domains also have `train`, which its small models learn from.)"""
    tasks: tuple[str, ...]
    """Names of lm-eval tasks."""
    task_paths: tuple[Path, ...] = ()
    """Folders in which lm-eval finds the YAML files of those tasks, where they are not its own."""
    provenance: str = ""
    """Where texts and items come from."""
    licence: str = ""
    benchmarks: tuple[str, ...] = ()
    """Names of public lm-eval benchmarks, evaluated instead of `tasks` where their data is at hand."""


@dataclass(frozen=True)
class Budget:
    """How much a strategy may remove."""

    sparsity: float
    """Share of FFN neurons to remove, between 0 and 1."""
    expert_sparsity: float = 0.0
    """Share of each layer's routed experts to remove whole."""


@dataclass(frozen=True)
class Context:
    """All that a strategy may look at."""

    domain: str
    """The domain whose mask is asked for."""
    budget: Budget
    sites: Mapping[str, Site]
    """Module path to site, in module order; a site's `gate`, `up` and `down` are its weights, read-only."""
    profile: Profile | None
    """The statistics that the strategy's `requires` names; none where it names none."""
    generator: torch.Generator
    """A seeded source of randomness on the CPU; the only one a strategy should use."""
    model: PreTrainedModel | None = None
    """The dense model, for strategies that need forwards or gradients."""
    batches: Sequence[Mapping[str, torch.Tensor]] = field(default=())
    """Calibration batches (`input_ids`, `attention_mask`: `[batch, tokens]`) for `model`."""
    counted: Sequence[torch.Tensor] = field(default=())
    """For each of `batches`, which tokens are the text's own, neither padding nor BOS: boolean `[batch, tokens]`."""
    prepared: Any = None
    """What the strategy's `prepare` returned."""


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies. A strategy is a frozen dataclass whose fields are its options.

    `negative:pool=model` on the command line makes `Negative(pool="model")`. Fields must have defaults and be
    annotated `int`, `float`, `bool`, `str` or a `Literal` of strings. A subclass overrides the one method of its kind.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "static"
    """`static`: one mask per domain. `prompt`: one mask per prompt. `token`: one mask per token."""
    requires: ClassVar[tuple[str, ...]] = ()
    """The statistics it reads from the profile: names in `spath_eval.profiling.STATISTICS`."""
    all_domains: ClassVar[bool] = False
    """Whether it compares its domain with the other reference domains, which are then profiled too."""
    needs_batches: ClassVar[bool] = False
    """Whether it reads the context's `batches`."""
    reads_product: ClassVar[bool] = True
    """Kind `token`: whether `keep` reads `product`. A kernel hands one that does not a tensor on the meta device."""
    control: ClassVar[bool] = False
    """Whether it is no rival but a check: it must look bad, or exactly neutral."""

    def select(self, context: Context) -> Mask:
        """Kind `static`: the mask of `context.domain` within `context.budget`.

        It is called again with the profiles of two halves of the text, to see how far they agree.
        """
        raise NotImplementedError(f"{type(self).__name__} is of kind {self.kind} and selects no static mask")

    def select_prompt(self, context: Context, activations: Mapping[str, torch.Tensor]) -> Mask:
        """Kind `prompt`: the mask for what follows a prompt.

        `activations` maps a site's path to what entered its down projection over the prompt, `[tokens, width]`.
        """
        raise NotImplementedError(f"{type(self).__name__} is of kind {self.kind} and selects no prompt mask")

    def prepare(self, context: Context) -> Any:
        """Kind `token`: what `keep` finds in `context.prepared`; computed once, while the model is dense.

        It is the place for forwards over the context's `batches`.
        """
        return None

    def keep(self, context: Context, site: Site, gate: torch.Tensor | None, product: torch.Tensor) -> torch.Tensor:
        """Kind `token`: which neurons each token keeps, boolean `[tokens, width]`.

        `gate` is the activated gate (none where the site has no gate) and `product` what would enter the down
        projection, both `[tokens, width]`.
        """
        raise NotImplementedError(f"{type(self).__name__} is of kind {self.kind} and keeps nothing by token")


class Report(Protocol):
    """Turns a record into text."""

    name: str

    def render(self, record: Mapping[str, Any], *, width: int, colour: bool) -> str:
        """The report on `record`; escape codes are for `colour` alone.

        It is lines, each with a line end and at most `width` columns wide, unless it is a format of files.
        """


@dataclass(frozen=True)
class LoadRequest:
    """What `spath_load_model` is asked for."""

    reference: str
    """Hub id, checkpoint folder or GGUF file."""
    revision: str | None
    architecture: Architecture | None
    """The family asked for; none where the configuration decides."""
    device: str
    dtype: str
    device_map: str | None = None


Register = Callable[[Any], None]
"""What the registering hooks are handed: call it once per object."""
Write = Callable[[str], None]
