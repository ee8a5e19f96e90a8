"""The six findings of the "Sparse Pathways" paper, measured on the models at hand, beside the published values.

`measure` gives one model's part of every table, from one profile over the reference domains and from forwards on
held-out text; `findings` puts the models' parts beside the published rows and says plainly what either gives; `render`
makes text or Markdown of the result, which is a plain dictionary. With a[d, j] the mean absolute activation of neuron j
over the tokens of domain d:

    specialised   max over d of a[d, j] / mean over d of a[d, j] exceeds a threshold
    skippable     a[d, j] lies below a percentile of all a of the layer, or of the model, over all domains together
    1/(1 - share) the speedup that the paper derives from either share: on paper, no time is measured

The paper states no percentile and no pooling; `docs/findings.md` says how they are read here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from spath_eval.contracts import UsageError
from spath_eval.masks import Mask, Pool, keep_all, remove_lowest
from spath_eval.pathways import Exercise, Pathway, StaticPathway
from spath_eval.profiling import ROUTING, Profile
from spath_eval.reports.tables import Group, Table, p_value, wrapped
from spath_eval.session import LoadedModel
from spath_eval.sites import Site

Format = Literal["text", "markdown"]
Result = Mapping[str, Any]
"""What `findings` returns, or one model's part of it."""

SOURCE = {
    "title": "Sparse Pathways: Domain-Aware Neuron Routing for Efficient Transformer Inference",
    "author": "A. Young",
    "url": "https://research.automate-capture.com/journals/sparse-pathways-neuron-routing",
}
STATISTICS = ("mean_abs", ROUTING)
"""What the profile must hold: the statistics of the strategy `negative`, so that the two share a cache."""

PUBLISHED: Mapping[str, Any] = {
    "scale": [
        {"model": "phi-2", "billions": 2.7, "share": 0.309, "speedup": 1.45},
        {"model": "Phi-3.5-mini", "billions": 3.8, "share": 0.302, "speedup": 1.43},
        {"model": "K2-Think", "billions": 32.0, "share": 0.682, "speedup": 3.14},
    ],
    "depth": [
        {"depth": 0.03, "share": 0.144},
        {"depth": 0.28, "share": 0.796},
        {"depth": 0.53, "share": 0.729},
        {"depth": 0.88, "share": 0.866},
        {"depth": 0.97, "share": 0.769},
    ],
    "architectures": [
        {"model": "gemma-2b", "billions": 2.5, "share": 0.518},
        {"model": "Qwen1.5-1.8B", "billions": 1.8, "share": 0.476},
        {"model": "TinyLlama", "billions": 1.1, "share": 0.074},
    ],
    "skippable": [
        {"domain": "math", "share": 0.904, "speedup": 10.47},
        {"domain": "code", "share": 0.729, "speedup": 3.70},
        {"domain": "factual", "share": 0.521, "speedup": 2.08},
        {"domain": "language", "share": 0.483, "speedup": 1.88},
    ],
    "mixtures": {"used": 8, "experts": 384, "share": 0.021},
    "preservation": {"sparsities": [0.05, 0.15], "cosine": 0.999},
    "claims": {"slope": 1.31, "spearman": 0.999, "ci95": [0.995, 0.9999], "early_layers": [0.7, 0.9]},
}
"""The paper's figures, shares between 0 and 1. It gives no sizes with its three other architectures: those are of their
model cards. `depth` is of K2-Think: layer / number of layers, as 3, 28, 53, 88 and 97% are of its 64."""

EXACT_PAIRINGS = 50_000
"""Pairings up to which a permutation p value is computed from all of them: those of 8 points."""


@dataclass(frozen=True)
class Definitions:
    """What the paper leaves open, or a reader may want to vary."""

    ratio: float = 2.0
    """A neuron is specialised where its largest mean activation exceeds so many times the mean over domains."""
    percentile: float = 50.0
    """A neuron is skippable in a domain where its activation there lies below this percentile."""
    pool: Pool = "layer"
    """Over what negative selection ranks neurons for the output preservation of table 6."""
    sparsities: tuple[float, ...] = (0.05, 0.15, 0.3, 0.5)
    """Shares of neurons removed for table 6."""
    ablation_depths: tuple[float, ...] = (0.0, 0.28, 0.53, 0.88)
    """Depths of the layers that are made sparse one at a time; none skips the ablations."""
    ablation_sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Activity:
    """Mean absolute activation of every neuron in every domain."""

    domains: tuple[str, ...]
    layers: tuple[NDArray[np.float64], ...]
    """For each layer with an FFN, `[domains, neurons]`: all its sites, all their experts."""
    comparable: tuple[NDArray[np.bool_], ...]
    """For each layer `[neurons]`: whether every domain has a mean of it. Experts that no token of a domain is routed to
    have none there."""

    @classmethod
    def of(cls, profile: Profile, sites: Iterable[Site]) -> Activity:
        """The activity that a profile with `mean_abs` and, of experts, `routing_share` holds."""
        domains = tuple(profile.domains)
        values: dict[str, list[NDArray[np.float64]]] = {}
        known: dict[str, list[NDArray[np.bool_]]] = {}
        for site in sites:
            means = _by_domain(profile, "mean_abs", site)
            met = np.ones(means.shape[1:], dtype=np.bool_)
            if site.experts:
                met &= np.all(_by_domain(profile, ROUTING, site) > 0, axis=0, keepdims=True).T
            values.setdefault(layer_of(site), []).append(means.reshape(len(domains), -1))
            known.setdefault(layer_of(site), []).append(met.ravel())
        return cls(
            domains,
            tuple(np.concatenate(parts, axis=1) for parts in values.values()),
            tuple(np.concatenate(parts) for parts in known.values()),
        )

    def ratios(self, layer: int) -> NDArray[np.float64]:
        """Of the comparable neurons of a layer: largest mean over domains / mean of them; 0 of one that is never
        active."""
        return ratios(self.layers[layer][:, self.comparable[layer]])


class Watched(Pathway):
    """A pathway whose every forward is watched, so that a mask that was not applied is found out."""

    def __init__(self, pathway: Pathway, exercise: Exercise) -> None:
        super().__init__(pathway.sites)
        self.pathway, self.exercise = pathway, exercise

    @contextmanager
    def applied(self) -> Iterator[None]:
        with self.pathway.applied(), self.exercise.watching():
            yield


def layer_of(site: Site) -> str:
    """The number of a site's layer, the first number in its path; the path itself where there is none."""
    return next((part for part in site.path.split(".") if part.isdigit()), site.path)


def ratios(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maximum / mean over the first axis, 0 where the mean is: `[domains, neurons]` to `[neurons]`, at most the number
    of domains."""
    mean = values.mean(0)
    return np.divide(values.max(0), mean, out=np.zeros_like(mean), where=mean > 0)


def speedup(share: float) -> float | None:
    """1 / (1 - share), the paper's potential speedup; none where nothing would be left to compute."""
    return 1 / (1 - share) if share < 1 else None


def specialisation(activity: Activity, ratio: float) -> dict[str, Any]:
    """Shares of specialised neurons: of all, of each layer, and of those that each domain activates most."""
    found = [activity.ratios(layer) > ratio for layer in range(len(activity.layers))]
    strongest = np.concatenate(
        [
            values[:, known][:, special].argmax(0)
            for values, known, special in zip(activity.layers, activity.comparable, found, strict=True)
        ]
    )
    everything = np.concatenate(found)
    counts = np.bincount(strongest, minlength=len(activity.domains)) / max(1, len(everything))
    return {
        "neurons": sum(values.shape[1] for values in activity.layers),
        "compared": len(everything),
        **_share(everything),
        "by_domain": dict(zip(activity.domains, counts.tolist(), strict=True)),
        "layers": [{"layer": layer, "depth": layer / len(found), **_share(part)} for layer, part in enumerate(found)],
    }


def agreement(profile: Profile, sites: Sequence[Site], ratio: float) -> dict[str, Any]:
    """Shares of neurons that are specialised in either half of the profile text, and how far the halves agree on which:
    of those that are in one half at least, the share that is in both (Jaccard). What does not repeat is noise."""
    try:
        halves = [Activity.of(profile.half(index), sites) for index in (0, 1)]
    except UsageError as error:
        return {"shares": None, "jaccard": None, "reason": str(error)}
    first, second = (
        np.concatenate(
            [(ratios(values) > ratio) & known for values, known in zip(half.layers, half.comparable, strict=True)]
        )
        for half in halves
    )
    shares = [float(part.mean()) for part in (first, second)]
    either = int((first | second).sum())
    if not either:
        return {"shares": shares, "jaccard": None, "reason": "no neuron is specialised in either half"}
    return {"shares": shares, "jaccard": int((first & second).sum()) / either}


def skippable(activity: Activity, percentile: float) -> dict[str, Any]:
    """Per domain, the share of neurons whose activation lies below the percentile of all domains together.

    The percentile is pooled over the layer or over the model; shares are of the first layer and of all layers.
    """
    flat = [values.ravel() for values in activity.layers]
    sizes = [values.shape[1] for values in activity.layers]
    thresholds: dict[str, list[float]] = {
        "layer": [float(np.percentile(values, percentile)) for values in flat],
        "model": [float(np.percentile(np.concatenate(flat), percentile))] * len(flat),
    }
    pools: dict[str, Any] = {}
    for pool, limits in thresholds.items():
        below = [(values < limit).mean(1) for values, limit in zip(activity.layers, limits, strict=True)]
        overall = np.average(below, axis=0, weights=sizes)
        pools[pool] = {
            domain: {
                "first_layer": _with_speedup(below[0][row]),
                "all_layers": _with_speedup(overall[row]),
            }
            for row, domain in enumerate(activity.domains)
        }
    medians = {"first_layer": float(np.median(flat[0])), "all_layers": float(np.median(np.concatenate(flat)))}
    return {"pools": pools, "median_activation": medians}


def mixture(profile: Profile, sites: Sequence[Site], ratio: float) -> dict[str, Any] | None:
    """Use and specialisation of routed experts; none for a dense model.

    An expert is specialised where its largest share of a domain's tokens exceeds `ratio` times the mean of its shares.
    Inside experts, activations are averaged over the tokens that were routed to them, and neurons are compared of
    experts that every domain uses.
    """
    routed = [site for site in sites if site.experts]
    if not routed:
        return None
    shares = [_by_domain(profile, ROUTING, site) for site in routed]
    together = np.concatenate(shares, axis=1)
    inside = Activity.of(profile, routed)
    within = np.concatenate([inside.ratios(layer) for layer in range(len(inside.layers))])
    used = (together > 0).sum(1)
    return {
        "layers": len(routed),
        "experts": together.shape[1],
        "experts_per_layer": together.shape[1] / len(routed),
        "used_per_token": float(np.mean([part.sum(1).mean() for part in shares])),
        "domains": {
            domain: {"used": int(count), "never_used": float(1 - count / together.shape[1])}
            for domain, count in zip(profile.domains, used, strict=True)
        },
        "specialised_experts": float((ratios(together) > ratio).mean()),
        "inside": {"compared": len(within), **_share(within > ratio)},
    }


def nearest_layers(depths: Iterable[float], layers: int) -> list[int]:
    """For each depth, layer / number of layers, the layer that is nearest to it."""
    return [min(round(depth * layers), layers - 1) for depth in depths]


def correlation(sizes: ArrayLike, shares: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """Spearman's and Pearson's correlation of two samples, their p values and intervals, and the slope in percentage
    points per unit of size.

    p values are two-sided, twice the smaller tail, from all pairings up to 8 points and from 50,000 random ones beyond
    (`scipy.stats.pearsonr`). 95% intervals are Fisher's, of Spearman's with the standard error of Bonett & Wright
    ("Sample size requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika 65, 2000):
    normal approximations, undefined below 4 points. The slope is of least squares, its interval Student's.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = "fewer than 3 points" if len(x) < 3 else "all points have the same size, or the same share"
        return {"points": len(x), "spearman": None, "pearson": None, "slope": None, "reason": reason}
    line = stats.linregress(x, 100 * y)
    reach = float(stats.t.ppf(0.975, len(x) - 2)) * float(line.stderr)
    slope = float(line.slope)
    return {
        "points": len(x),
        "spearman": _coefficient(stats.rankdata(x), stats.rankdata(y), seed, ranks=True),
        "pearson": _coefficient(x, y, seed, ranks=False),
        "slope": {"value": slope, "ci95": [slope - reach, slope + reach]},
    }


def possible_spearmans(points: int) -> list[float]:
    """Every value that Spearman's correlation of so many points, without ties, can have."""
    order = range(points)
    return sorted({round(float(stats.spearmanr(order, other).statistic), 6) for other in permutations(order)})


def measure(
    loaded: LoadedModel, definitions: Definitions, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], Profile]:
    """One model's part of every table, over the domains of its session, and the profile that it is of.

    `say` is told what is being done. Raises `GateError` where a mask was not applied, and `UsageError` where a domain
    has no text to profile or to compare outputs on.
    """
    started = time.perf_counter()
    session = loaded.session
    name = loaded.target.name
    say(f"{name}: profiling {len(session.domains)} domains")
    profile = loaded.make_profile(session.domains, STATISTICS)
    activity = Activity.of(profile, loaded.sites)
    neutrality = loaded.neutrality("masked", session.domains[0])
    shapes = sorted({site.ffn.shape for site in loaded.sites})
    config = loaded.model.config.get_text_config()
    experts = mixture(profile, loaded.sites, definitions.ratio)
    found = {
        "model": loaded.record() | {"gates": dataclasses.asdict(neutrality)},
        "profile": {
            "fingerprint": profile.fingerprint,
            "tokens": {domain: part.tokens for domain, part in profile.domains.items()},
            "texts": {domain: part.source for domain, part in profile.domains.items()},
        },
        "ffn": {
            "shapes": shapes,
            "activation": getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "-"),
        },
        "specialised": specialisation(activity, definitions.ratio),
        "halves": agreement(profile, loaded.sites, definitions.ratio),
        "skippable": skippable(activity, definitions.percentile),
        "mixture": experts,
        **({"mixture_reason": "dense: no routed experts"} if experts is None else {}),
        "preservation": _preservation(loaded, profile, definitions, say),
        "ablations": _ablations(loaded, profile, definitions, say),
    }
    return found | {"seconds": time.perf_counter() - started}, profile


def findings(parts: Sequence[Result], definitions: Definitions, *, seed: int = 0) -> dict[str, Any]:
    """The models' parts with the published values, the correlations of both, and what follows from them in words."""
    published = [*PUBLISHED["scale"], *PUBLISHED["architectures"]]
    samples = {
        "published": [(row["billions"], row["share"]) for row in PUBLISHED["scale"]],
        "published_with_architectures": [(row["billions"], row["share"]) for row in published],
        "measured": [
            (part["model"]["parameters"] / 1e9, part["specialised"]["share"])
            for part in parts
            if part["specialised"]["share"] is not None
        ],
    }
    result = {
        "source": SOURCE,
        "definitions": dataclasses.asdict(definitions),
        "published": PUBLISHED,
        "correlations": {
            name: correlation([x for x, _ in points], [y for _, y in points], seed=seed)
            for name, points in samples.items()
        },
        "models": list(parts),
    }
    return result | {"statements": {name: make(result) for name, make in STATEMENTS.items()}}


def render(result: Mapping[str, Any], form: Format, width: int = 100) -> str:
    """The result of `findings` as text at most `width` columns wide, or as Markdown."""
    about, tables = _about(result), list(_tables(result))
    if form == "markdown":
        lines = "\n".join(f"- {line}" for line in about[1:])
        return "\n\n".join([f"# {about[0]}", lines, *map(_markdown, tables)])
    lines = "\n".join(wrapped(line, width, "  ") for line in about)
    return "\n\n".join([lines, *(table.text(width, False) for table in tables)])


def _by_domain(profile: Profile, statistic: str, site: Site) -> NDArray[np.float64]:
    """A site's values, `[domains, ...]`."""
    return np.stack([profile.statistic(statistic, domain)[site.path].numpy() for domain in profile.domains])


def _share(found: NDArray[np.bool_]) -> dict[str, float | str | None]:
    if not len(found):
        return {"share": None, "speedup": None, "reason": "no expert is used by every domain"}
    return _with_speedup(found.mean())


def _with_speedup(share: np.floating[Any]) -> dict[str, float | str | None]:
    value = speedup(float(share))
    reason = {"speedup_reason": "nothing would be left to compute"} if value is None else {}
    return {"share": float(share), "speedup": value, **reason}


def _coefficient(x: NDArray[np.float64], y: NDArray[np.float64], seed: int, *, ranks: bool) -> dict[str, Any]:
    """Pearson's correlation, which is Spearman's of `ranks`."""
    points = len(x)
    method = stats.PermutationMethod(n_resamples=EXACT_PAIRINGS, random_state=np.random.default_rng(seed))
    found = stats.pearsonr(x, y, method=method)
    value = float(np.clip(found.statistic, -1, 1))
    result: dict[str, Any] = {
        "value": value,
        "p_value": float(found.pvalue),
        "exact": math.factorial(points) <= EXACT_PAIRINGS,
        "ci95": None,
    }
    if points < 4:
        return result | {"ci95_reason": f"{points} points leave Fisher's z no standard error"}
    if abs(value) > 1 - 1e-12:
        return result | {"ci95_reason": "all points lie in order, and Fisher's z is infinite"}
    reach = float(stats.norm.ppf(0.975)) * math.sqrt((1 + value**2 / 2 if ranks else 1) / (points - 3))
    return result | {"ci95": [math.tanh(math.atanh(value) + sign * reach) for sign in (-1, 1)]}


def _preservation(
    loaded: LoadedModel, profile: Profile, definitions: Definitions, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Output preservation of negative selection, by domain and sparsity."""
    entries = []
    for domain in profile.domains:
        say(f"{loaded.target.name}: output preservation in {domain}")
        scores = profile.statistic("mean_abs", domain)
        for sparsity in definitions.sparsities:
            mask = remove_lowest(scores, sparsity, definitions.pool)
            entries.append({"domain": domain, "sparsity": sparsity, **_compare(loaded, domain, mask)})
    return entries


def _ablations(
    loaded: LoadedModel, profile: Profile, definitions: Definitions, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Output preservation with one layer sparse by negative selection and all others whole."""
    layers = list(dict.fromkeys(layer_of(site) for site in loaded.sites))
    entries = []
    for number in dict.fromkeys(nearest_layers(definitions.ablation_depths, len(layers))):
        say(f"{loaded.target.name}: layer {number} alone")
        own = [site.path for site in loaded.sites if layer_of(site) == layers[number]]
        for domain in profile.domains:
            scores = profile.statistic("mean_abs", domain)
            for sparsity in definitions.ablation_sparsities:
                sparse = remove_lowest({path: scores[path] for path in own}, sparsity)
                mask = Mask({**keep_all(loaded.sites).keep, **sparse.keep})
                about = {"layer": number, "depth": number / len(layers), "domain": domain, "sparsity": sparsity}
                entries.append(about | _compare(loaded, domain, mask))
    return entries


def _compare(loaded: LoadedModel, domain: str, mask: Mask) -> dict[str, Any]:
    pathway = StaticPathway(loaded.sites, mask, "masked")
    exercise = Exercise(loaded.model, pathway)
    exercise.scoring = True
    preservation = loaded.preservation(loaded.session.registry.domain(domain))
    compared = preservation.compare(Watched(pathway, exercise), seed=loaded.session.options.seed)
    exercise.check(["scoring"])
    documents = len(preservation.dense_nats)
    if documents == 1:
        compared["perplexity"] |= {"ci95": None, "ci95_reason": "one document does not vary"}
    return {"mask": mask.digest, "achieved": mask.achieved, "documents": documents, **compared}


def _scale_statements(result: Result) -> list[str]:
    claims, found = result["published"]["claims"], result["correlations"]
    three, six, measured = (found[name] for name in ("published", "published_with_architectures", "measured"))
    points = three["points"]
    possible = ", ".join(f"{value:g}" for value in possible_spearmans(points))
    low, high = claims["ci95"]
    lines = [
        f'The {points} published rows give {_correlated(three)}. "Spearman {claims["spearman"]:g} [{low:g}, {high:g}]" '
        f"cannot be: of {points} points without ties Spearman's can only be {possible}. 0.999 is Pearson's. There is "
        f"no interval, as {three['pearson']['ci95_reason']}, and no p below {2 / math.factorial(points):.3f} exists.",
        f"With the three of table 3 the published rows give {_correlated(six)}.",
        f'"+{claims["slope"]:g}% per billion parameters" is the slope of the line through the {points} rows: '
        f"{_slope(three)}. Through all {six['points']} it is {_slope(six)}.",
    ]
    if measured["spearman"] is None:
        lines.append(f"Measured: no correlation, for there are {measured['reason']}.")
    else:
        lines.append(
            f"The {measured['points']} measured models give {_correlated(measured)}, slope {_slope(measured)}. "
            "They differ in family, training and number of layers as well as in size."
        )
    return [
        *lines,
        "1/(1 - share) is a figure on paper. It takes all specialised neurons for skippable in every domain at once, "
        "though each of them is one that some domain uses most; and no model is FFN alone.",
        "In both halves: of the neurons specialised in either half of the profile text, the share specialised in both.",
    ]


def _depth_statements(result: Result) -> list[str]:
    least, most = result["published"]["claims"]["early_layers"]
    span = _span(least, most)
    lines = []
    for part in result["models"]:
        cells = [cell for cell in part["ablations"] if least <= cell["sparsity"] <= most]
        first = [cell["perplexity"]["ratio"] for cell in cells if cell["layer"] == 0]
        later = [cell["perplexity"]["ratio"] for cell in cells if cell["layer"] > 0]
        if first and later:
            lines.append(
                f"{part['model']['name']}: layer 0 alone at {span} multiplies perplexity by "
                f"{_range(first)}, any other ablated layer by {_range(later)}."
            )
    if not lines:
        return [f'"Early layers can be {span} sparse" was not tested: no layer was made that sparse alone.']
    return [
        f'"Early layers can be {span} sparse" is tested by making one layer sparse, by negative '
        "selection for the very domain that it is tested on, while all others stay whole.",
        *lines,
    ]


def _architecture_statements(result: Result) -> list[str]:
    domains = max(len(part["profile"]["tokens"]) for part in result["models"])
    return [
        f"The ratio over {domains} domains cannot exceed {domains}. Shares depend on how many domains there are and on "
        "their texts, which the paper does not name: published and measured shares are not of the same texts.",
    ]


def _skippable_statements(result: Result) -> list[str]:
    published, percentile = result["published"]["skippable"], result["definitions"]["percentile"]
    lines = [
        f"The threshold is percentile {percentile:g} of all domains together: of each domain alone, every share would "
        f"be {percentile:g}% by construction. The mean over domains still is, but for layer 0 pooled over the model: "
        "only the differences between domains are findings.",
    ]
    mean = float(np.mean([row["share"] for row in published]))
    odd = [
        f"{row['share']:.1%} is {speedup(row['share']):.2f}x, not {row['speedup']:.2f}x"
        for row in published
        if not _rounds_to(row["share"], row["speedup"])
    ]
    lines.append(
        f"The paper states neither percentile nor texts. Its shares have the mean {mean:.1%}. By 1/(1 - share) of the "
        f"share as printed, {'; '.join(odd)}."
    )
    for part in result["models"]:
        pools, medians = part["skippable"]["pools"], part["skippable"]["median_activation"]
        layer, model = (
            _range([domain["first_layer"]["share"] for domain in pools[pool].values()], "{:.1%}")
            for pool in ("layer", "model")
        )
        lines.append(
            f"{part['model']['name']}: of layer 0, {model} is skippable pooled over the model, {layer} by layer. "
            f"Its median activation is {medians['first_layer']:.2g}, the model's {medians['all_layers']:.2g}."
        )
    return [
        *lines,
        "Pooled over the model, a layer of small activations is skippable in every domain: that is a difference "
        "between layers and not specialisation.",
    ]


def _mixture_statements(result: Result) -> list[str]:
    published = result["published"]["mixtures"]
    dense = [part["model"]["name"] for part in result["models"] if part["mixture"] is None]
    return [
        f"{published['used']} of {published['experts']} experts is what the router chooses for each token by design, "
        "whatever the text. What a domain can do without is told by the experts that none of its tokens use.",
        *([f"Dense, without routed experts: {', '.join(dense)}."] if dense else []),
    ]


def _preservation_statements(result: Result) -> list[str]:
    published = result["published"]["preservation"]
    low, high = published["sparsities"]
    cells = [cell for part in result["models"] for cell in part["preservation"]]
    claimed = [cell for cell in cells if low <= cell["sparsity"] <= high]
    kept = sum(cell["cosine"] >= published["cosine"] for cell in claimed)
    tokens, documents = (_range([cell[what] for cell in cells], "{:,}") for what in ("tokens", "documents"))
    return [
        f"Published: cosine {published['cosine']:g} or more at {_span(low, high)}. Measured: in {kept} of "
        f"{len(claimed)} (models x domains x sparsities there). Here it is of the final hidden states, which the "
        'output head sees; the paper says of "neuron outputs".',
        f"Negative selection, pooled by {result['definitions']['pool']}; {tokens} held-out tokens of each domain, in "
        f"{documents} documents. [95%]: over documents, [-] of a single one, not adjusted for the number of figures.",
    ]


STATEMENTS: Mapping[str, Callable[[Result], list[str]]] = {
    "scale": _scale_statements,
    "depth": _depth_statements,
    "architectures": _architecture_statements,
    "skippable": _skippable_statements,
    "mixtures": _mixture_statements,
    "preservation": _preservation_statements,
}
"""Table to what it says in words."""


def _tables(result: Result) -> Iterator[Table]:
    models = result["models"]
    yield _scale_table(result)
    yield _depth_table(result)
    if any(part["ablations"] for part in models):
        yield _ablation_table(models)
    yield _architecture_table(result)
    yield _skippable_table(result)
    yield _mixture_table(result)
    yield from _preservation_tables(result)


def _scale_table(result: Result) -> Table:
    published = [
        (row["model"], f"{row['billions']:g} B", _percent(row["share"]), _times(row["speedup"]), "-")
        for row in result["published"]["scale"]
    ]
    measured = [
        (
            part["model"]["name"],
            f"{part['model']['parameters'] / 1e9:.4f} B",
            _percent(part["specialised"]["share"]),
            _times(part["specialised"]["speedup"]),
            "-" if part["halves"]["jaccard"] is None else f"{part['halves']['jaccard']:.2f}",
        )
        for part in result["models"]
    ]
    return Table(
        "1. Scale: share of specialised neurons",
        ("model", "parameters", "specialised", "1/(1 - share)", "in both halves"),
        [Group("published", published), Group("measured", measured)],
        result["statements"]["scale"],
    )


def _depth_table(result: Result) -> Table:
    published = result["published"]["depth"]
    rows = []
    for part in result["models"]:
        layers = part["specialised"]["layers"]
        chosen = [layers[number] for number in nearest_layers([row["depth"] for row in published], len(layers))]
        cells = (f"{_percent(layer['share'])} ({layer['layer']})" for layer in chosen)
        rows.append((part["model"]["name"], str(len(layers)), *cells, _percent(part["specialised"]["share"])))
    return Table(
        "2. Depth: share of specialised neurons in the layer (number) nearest to a depth, layer / layers",
        ("model", "layers", *(f"{row['depth']:.0%}" for row in published), "all"),
        [
            Group("published", [("K2-Think", "64", *(_percent(row["share"]) for row in published), "68.2%")]),
            Group("measured", rows),
        ],
        result["statements"]["depth"],
    )


def _ablation_table(models: Sequence[Result]) -> Table:
    groups = []
    for part in models:
        rows = []
        for layer in dict.fromkeys(cell["layer"] for cell in part["ablations"]):
            own = [cell for cell in part["ablations"] if cell["layer"] == layer]
            worst = (
                max((cell for cell in own if cell["sparsity"] == one), key=lambda cell: cell["perplexity"]["ratio"])
                for one in _sparsities(own)
            )
            cells = (f"{_ratio(cell, 2)} {cell['domain']}" for cell in worst)
            rows.append((f"{layer} ({own[0]['depth']:.0%})", *cells))
        groups.append(Group(part["model"]["name"], rows))
    return Table(
        "2b. One layer sparse, all others whole: perplexity ratio [95%] in the domain that loses most",
        ("layer (depth)", *(f"{sparsity:.0%}" for sparsity in _sparsities(models[0]["ablations"]))),
        groups,
    )


def _architecture_table(result: Result) -> Table:
    domains = list(result["models"][0]["profile"]["tokens"])
    published = [
        (row["model"], "-", "-", _percent(row["share"]), *("-" for _ in domains))
        for row in result["published"]["architectures"]
    ]
    measured = [
        (
            part["model"]["name"],
            "+".join(part["ffn"]["shapes"]),
            part["ffn"]["activation"],
            _percent(part["specialised"]["share"]),
            *(_percent(part["specialised"]["by_domain"][domain]) for domain in domains),
        )
        for part in result["models"]
    ]
    return Table(
        "3. Architectures: share of specialised neurons, and in which domain they are most active",
        ("model", "FFN", "activation", "specialised", *domains),
        [Group("published", published), Group("measured", measured)],
        result["statements"]["architectures"],
    )


def _skippable_table(result: Result) -> Table:
    groups = [
        Group(
            "published: layer 0, pooling not stated",
            [
                (row["domain"], f"{_percent(row['share'])} {_times(row['speedup'])}", "-", "-", "-")
                for row in result["published"]["skippable"]
            ],
        )
    ]
    for part in result["models"]:
        pools = part["skippable"]["pools"]
        rows = []
        for domain in pools["layer"]:
            cells = (
                pools[pool][domain][scope] for pool in ("layer", "model") for scope in ("first_layer", "all_layers")
            )
            rows.append((domain, *(f"{_percent(cell['share'])} {_times(cell['speedup'])}" for cell in cells)))
        groups.append(Group(part["model"]["name"], rows))
    return Table(
        "4. Skippable neurons: share and 1/(1 - share), percentile pooled by layer or over the model",
        ("domain", "layer 0, by layer", "all, by layer", "layer 0, by model", "all, by model"),
        groups,
        result["statements"]["skippable"],
    )


def _mixture_table(result: Result) -> Table:
    published = result["published"]["mixtures"]
    per_token = f"{published['used']} of {published['experts']} ({_percent(published['share'])})"
    groups = [Group("published", [("-", per_token, "-", "-")])]
    for part in result["models"]:
        found = part["mixture"]
        if found is None:
            continue
        share = found["used_per_token"] / found["experts_per_layer"]
        rows = [
            (
                domain,
                f"{found['used_per_token']:g} of {found['experts_per_layer']:g} ({_percent(share)})",
                f"{row['used']} of {found['experts']}",
                _percent(row["never_used"]),
            )
            for domain, row in found["domains"].items()
        ]
        experts, inside = _percent(found["specialised_experts"]), _percent(found["inside"]["share"])
        heading = (
            f"{part['model']['name']}: specialised are {experts} of the experts, by their share of tokens, and "
            f"{inside} of the {found['inside']['compared']:,} neurons inside experts that every domain uses"
        )
        groups.append(Group(heading, rows))
    return Table(
        "5. Mixtures: experts used for a token, in each layer, and for all tokens of a domain, in all layers",
        ("domain", "per token", "per domain", "never used"),
        groups,
        result["statements"]["mixtures"],
    )


def _preservation_tables(result: Result) -> Iterator[Table]:
    models, published = result["models"], result["published"]["preservation"]
    sparsities = _sparsities(models[0]["preservation"])
    low, high = published["sparsities"]
    header = ("domain", *(f"{sparsity:.0%}" for sparsity in sparsities))
    claimed = tuple(f"{published['cosine']:g}+" if low <= sparsity <= high else "-" for sparsity in sparsities)
    for title, cell, groups, below in (
        (
            "6. Output preservation: cosine/KL in nats/same next token",
            _kept,
            [("published", [("-", *claimed)])],
            (),
        ),
        ("6b. Output preservation: perplexity ratio [95%]", _ratio, [], result["statements"]["preservation"]),
    ):
        rows = [Group(*group) for group in groups]
        for part in models:
            by_domain: dict[str, list[str]] = {}
            for found in part["preservation"]:
                by_domain.setdefault(found["domain"], []).append(cell(found))
            rows.append(Group(part["model"]["name"], [(domain, *cells) for domain, cells in by_domain.items()]))
        yield Table(title, header, rows, below)


def _about(result: Result) -> list[str]:
    source, definitions = result["source"], result["definitions"]
    title = source["title"].partition(":")[0]
    lines = [
        f'Findings of "{title}" ({source["author"]}), measured, beside the published values.',
        f"Specialised: largest mean |activation| of the domains > {definitions['ratio']:g} x the mean over domains. "
        f"Skippable: mean |activation| in the domain below percentile {definitions['percentile']:g}.",
    ]
    for part in result["models"]:
        profile = part["profile"]
        tokens = _range(list(profile["tokens"].values()), "{:,}")
        lines.append(
            f"{part['model']['name']}: profile {profile['fingerprint'][:12]} in {profile['path']}, of {tokens} tokens "
            f"of each domain ({', '.join(profile['tokens'])})."
        )
    return lines


def _markdown(table: Table) -> str:
    from tabulate import tabulate

    parts = [f"## {table.title}"]
    alignment = ["left"] + ["right"] * (len(table.header) - 1)
    for group in table.groups:
        rows = tabulate(group.rows, table.header, tablefmt="pipe", disable_numparse=True, colalign=alignment)
        parts += [f"**{group.heading}**", rows]
    return "\n\n".join([*parts, *(["\n".join(f"- {line}" for line in table.below)] if table.below else [])])


def _sparsities(cells: Iterable[Mapping[str, Any]]) -> list[float]:
    return list(dict.fromkeys(cell["sparsity"] for cell in cells))


def _rounds_to(share: float, printed: float) -> bool:
    """Whether a share that is printed with three decimals can give a speedup that is printed with two."""
    low, high = (1 / (1 - share + sign * 0.0005) for sign in (1, -1))
    return low <= printed + 0.005 and high >= printed - 0.005


def _correlated(found: Mapping[str, Any]) -> str:
    texts = []
    for name in ("spearman", "pearson"):
        one = found[name]
        interval = f" [{one['ci95'][0]:.2f}, {one['ci95'][1]:.2f}]" if one["ci95"] else ""
        exact = "exact " if one["exact"] else ""
        texts.append(f"{name.capitalize()} {one['value']:.3f}{interval} ({exact}p {p_value(one['p_value'])})")
    return " and ".join(texts)


def _slope(found: Mapping[str, Any]) -> str:
    low, high = found["slope"]["ci95"]
    return f"{found['slope']['value']:+.3g} [{low:+.3g}, {high:+.3g}] points per billion"


def _range(values: Sequence[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _span(low: float, high: float) -> str:
    return f"{100 * low:g}-{100 * high:g}%"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _ratio(cell: Mapping[str, Any], digits: int = 3) -> str:
    value, *ends = (
        f"{one:.{digits}f}" if one < 10 else f"{one:.3g}"
        for one in (cell["perplexity"]["ratio"], *(cell["perplexity"]["ci95"] or ()))
    )
    return f"{value} [{', '.join(ends) or '-'}]"


def _kept(cell: Mapping[str, Any]) -> str:
    return f"{cell['cosine']:.4f}/{cell['kl']:.3f}/{cell['top1_agreement']:.3f}"
