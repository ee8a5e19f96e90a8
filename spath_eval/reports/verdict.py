"""What a record comes to, in one sentence for each model: what was kept, and how much of the possible speed was gained.

Controls and masks on domains that are not theirs are left out. Nothing is said that an interval does not bear out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spath_eval.reports.matrices import Case, is_own, label, mean_retention, perplexity_ratio
from spath_eval.reports.tables import ABOVE_CEILING, short

Timing = Mapping[str, Any]


def verdicts(record: Mapping[str, Any]) -> dict[str, str]:
    """Model to its sentence."""
    cases = record.get("cases", [])
    return {
        model: _sentence(model, [case for case in cases if case["model"] == model])
        for model in dict.fromkeys(case["model"] for case in cases)
    }


def is_rival(case: Case) -> bool:
    """Whether the case passed, is no control, and its mask is evaluated on its own domain."""
    return case["outcome"] == "passed" and is_own(case) and not case["strategy"].get("control")


def gain(timing: Timing) -> float | None:
    """Of the gain that the ceiling allows, the share that was reached; none where it allows none."""
    ceiling = timing.get("ceiling")
    return (timing["ratio"] - 1) / (ceiling - 1) if ceiling is not None and ceiling > 1 else None


def pace(timing: Timing) -> str:
    """What the interval of a speed ratio says."""
    if "fault" in timing:
        return f"measurement fault: {timing['fault']}"
    interval, ceiling = timing.get("ci95"), timing.get("ceiling")
    if not interval:
        return "no interval"
    low, high = interval
    if ceiling is not None and low > ceiling:
        return ABOVE_CEILING
    return "faster" if low > 1 else "slower" if high < 1 else "no difference shown"


def judged(timing: Timing) -> str:
    """The same, and where it is faster the share of the possible gain."""
    share = gain(timing)
    verdict = pace(timing)
    if share is None or verdict != "faster":
        return verdict
    return f"faster, {share:.0%} of the possible gain" if share <= 1 else "faster, by an estimate above its ceiling"


def of_model(case: Case) -> Mapping[str, Any]:
    """What was measured of the whole model's speed: phase to timing."""
    return next((entry for entry in case.get("speed", []) if entry["subject"] == "model"), {})


def _sentence(model: str, cases: Sequence[Case]) -> str:
    rivals = [case for case in cases if is_rival(case)]
    missed = sum(case["outcome"] != "passed" for case in cases)
    end = f"; {missed} of {len(cases)} cases did not pass." if missed else "."
    if not rivals:
        return f"{model}: nothing can be said, for no case passed that is not a control{end}"
    return (_one(model, rivals[0]) if len(rivals) == 1 else _many(model, rivals)) + end


def _one(model: str, case: Case) -> str:
    achieved = case.get("sparsity", {}).get("achieved")
    without = "with a mask" if achieved is None else f"without {achieved:.1%} of its FFN neurons"
    return f"{model}, {without} ({label(case)}), {'; '.join([_kept(case), _perplexity(case), _sped_up(case)])}"


def _kept(case: Case) -> str:
    found = mean_retention(case)
    tasks = _retained(case)
    if found["value"] is not None:
        mean = f"mean of {len(tasks)} tasks, " if len(tasks) > 1 else ""
        kept = f"keeps {_estimate(found, '{:.2f}'.format)} of what it scored above chance"
        return f"{kept} ({mean}{_documents(case)} documents, {_changed(case)} of them changed)"
    reasons = [entry["retention"].get("reason") for entry in case.get("quality", [])]
    reason = next(filter(None, reasons), case.get("quality_reason", "no task was scored"))
    return f"has no retention ({reason})"


def _perplexity(case: Case) -> str:
    found = perplexity_ratio(case)
    if found.get("value") is None:
        return f"perplexity was not compared ({found.get('reason') or 'not measured'})"
    return f"its perplexity on held-out text is {_estimate(found, short)} times the dense one"


def _sped_up(case: Case) -> str:
    timings = {phase: of_model(case)[phase] for phase in ("decode", "prefill") if of_model(case).get(phase)}
    if not timings:
        return f"its speed was not measured ({case.get('speed_reason') or 'only parts of it were timed'})"
    return ", ".join(f"{phase} runs {_fast(timing)} ({judged(timing)})" for phase, timing in timings.items())


def _fast(timing: Timing) -> str:
    ceiling = timing.get("ceiling")
    most = "" if ceiling is None else f", of at most {ceiling:.2f}"
    return f"{_estimate({**timing, 'value': timing['ratio']}, '{:.2f}'.format)} times as fast{most}"


def _many(model: str, cases: Sequence[Case]) -> str:
    parts = [_retentions(cases), _range(cases, perplexity_ratio, short, "perplexity ratio"), _fastest(cases)]
    return f"{model}, over {len(cases)} cases without controls: {'; '.join(parts)}"


def _retentions(cases: Sequence[Case]) -> str:
    """The range of the mean retention, how many intervals reach 1, and from how few documents."""
    if not any(case.get("quality") for case in cases):
        return "retention not measured"
    text = _range(cases, mean_retention, "{:.2f}".format, "mean retention")
    with_interval = [case for case in cases if mean_retention(case).get("ci95")]
    if with_interval:
        reaching = sum(mean_retention(case)["ci95"][1] >= 1 for case in with_interval)
        fewest = min(map(_documents, with_interval))
        unchanged = sum(not _changed(case) for case in with_interval)
        text += f", the interval reaching 1 in {reaching} of {len(with_interval)} (at least {fewest} documents each"
        text += f"; in {unchanged} of the cases none changed)" if unchanged else ")"
    return text


def _range(
    cases: Sequence[Case], of: Callable[[Case], Mapping[str, Any]], form: Callable[[float], str], name: str
) -> str:
    """From the lowest to the highest estimate."""
    found = [(of(case), case) for case in cases if of(case).get("value") is not None]
    found.sort(key=lambda one: one[0]["value"])
    ends = found if len(found) < 2 else [found[0], found[-1]]
    return f"{name} " + (" to ".join(f"{_estimate(one, form)} ({label(case)})" for one, case in ends) or "undefined")


def _fastest(cases: Iterable[Case]) -> str:
    """Of the phase that was timed, how many cases are faster, and the fastest of these, or else of all."""
    for phase in ("decode", "prefill"):
        timed = [(of_model(case)[phase], case) for case in cases if of_model(case).get(phase)]
        if timed:
            faster = sum(pace(timing) == "faster" for timing, _ in timed)
            best, case = max(timed, key=lambda one: (pace(one[0]) == "faster", one[0]["ratio"]))
            counted = f"{phase} faster in {faster} of {len(timed)} timed"
            return f"{counted}, at best {_fast(best)} ({label(case)}: {judged(best)})"
    return "the model's speed not measured"


def _retained(case: Case) -> list[Mapping[str, Any]]:
    """The tasks that have a retention."""
    return [entry for entry in case.get("quality", []) if entry["retention"]["value"] is not None]


def _documents(case: Case) -> int:
    """Of the tasks that have a retention; a task's documents count once, however many metrics score them."""
    return sum({entry["task"]: entry["documents"] for entry in _retained(case)}.values())


def _changed(case: Case) -> int:
    """Of those documents, how many got worse or better, by the metric that finds most."""
    counts: dict[str, int] = {}
    for entry in _retained(case):
        difference = entry["difference"]
        changed = (difference.get("lost") or 0) + (difference.get("gained") or 0)
        counts[entry["task"]] = max(changed, counts.get(entry["task"], 0))
    return sum(counts.values())


def _estimate(found: Mapping[str, Any], form: Callable[[float], str]) -> str:
    interval = found.get("ci95")
    return form(found["value"]) + (f" [{form(interval[0])}, {form(interval[1])}]" if interval else " (no interval)")
