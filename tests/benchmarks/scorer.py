"""Times lm-eval's `hf` model and `SpathLM` on the same requests of public benchmarks, and compares what they answer.

    python tests/benchmarks/scorer.py --model FOLDER [--model FOLDER] --data-dir DIR [--tasks arc_easy,piqa]
    python tests/benchmarks/scorer.py --model FOLDER --data-dir DIR --tasks wikitext --memory
    python tests/benchmarks/scorer.py --model FOLDER --data-dir DIR --whole-job

Both arms are in one process, on one model (float32 on the CPU, bfloat16 on CUDA, log-softmax in float32), and take
turns round by round, so that what disturbs the machine disturbs both. `hf` has the batch size that was fastest of those
tried. `SpathLM` forgets tokens and plans before every round, so that they count. DIR has the benchmarks' rows, as for
`spath-eval run --data-dir`. The result goes to stdout, progress to stderr.

A ratio is `hf`'s time over `SpathLM`'s within a round: the median, and in brackets the smallest and the largest. The
largest difference is that of two log-likelihoods; of whole pages (wikitext) it is divided by their words, which makes
it the relative difference of their perplexities per word.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import environment, peak_rss, quiet, say

SPARSITY = 0.15
SPARSE_ARMS = 4
ROWS = 32
"""Texts that `SpathLM` generates at a time; it takes no batch size to score."""
FEWSHOT_SEED = 1234
"""The one that lm-eval sets by default."""
PERPLEXITY_TOLERANCE = 1e-3
"""Relative difference beyond which a page has another perplexity per word."""
WHOLE_JOB = ("mmlu", "arc_challenge")


@dataclass(frozen=True)
class Benchmark:
    """What is measured under one name."""

    tasks: tuple[str, ...]
    """The stock tasks whose requests are answered together."""
    documents: int
    """The first so many of each task, by default."""
    num_fewshot: int | None = None
    """Examples; none stands for the stock number."""
    first_n: bool = False
    """Whether every document gets the same first examples, where the stock task draws others for each."""


BENCHMARKS = {
    "arc_easy": Benchmark(("arc_easy",), 100),
    "piqa": Benchmark(("piqa",), 100),
    "mmlu": Benchmark(("mmlu_abstract_algebra", "mmlu_anatomy", "mmlu_astronomy"), 30, num_fewshot=5),
    "arc_challenge": Benchmark(("arc_challenge",), 20, num_fewshot=5, first_n=True),
    "lambada_openai": Benchmark(("lambada_openai",), 80),
    "gsm8k": Benchmark(("gsm8k",), 12),
    "wikitext": Benchmark(("wikitext",), 2),
}


@dataclass(frozen=True)
class Timing:
    """One arm, once."""

    seconds: float
    answers: Sequence[Any]
    """What the model answered, in the order of the requests."""
    peak: int | None
    """Most bytes allocated on the device; none on the CPU."""


@dataclass(frozen=True)
class Differences:
    """How the answers of two arms to the same requests differ."""

    largest: float | None
    """Of two log-likelihoods, per word of a page; none where texts are generated."""
    documents: int
    """With another choice, another greedy continuation, another text, or a page beyond `PERPLEXITY_TOLERANCE`."""


def main() -> None:
    options = parse_options()
    quiet()

    if options.arm:
        run_one_arm(options)
        return
    print(environment("lm-eval"), flush=True)
    rows = list(whole_jobs(options) if options.whole_job else comparisons(options))
    import tabulate

    print(tabulate.tabulate(rows, headers="keys", disable_numparse=True, stralign="right"))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data_dir = os.environ.get("SPATH_DATA_DIR")
    parser.add_argument("--model", action="append", required=True, metavar="FOLDER", help="may be given several times")
    parser.add_argument("--data-dir", type=Path, default=data_dir, required=not data_dir, metavar="DIR")
    parser.add_argument(
        "--tasks", type=names, default=list(BENCHMARKS), metavar="A,B", help=f"some of {','.join(BENCHMARKS)}"
    )
    parser.add_argument("--documents", type=int, metavar="N", help="of each task, instead of a number for 1-3 minutes")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="of both arms (default: 3)")
    parser.add_argument(
        "--batch-sizes",
        type=lambda text: sorted(map(int, text.split(","))),
        default=[1, 4, 8, 16, 32],
        metavar="N,N",
        help="tried for hf (default: 1,4,8,16,32)",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="longest input in tokens (default: the model's)")
    parser.add_argument(
        "--memory", action="store_true", help="on the CPU: run each arm once more in a process of its own, for its peak"
    )
    parser.add_argument(
        "--whole-job",
        action="store_true",
        help=f"instead: hf's dense arm of {'+'.join(WHOLE_JOB)} against SpathLM's dense and {SPARSE_ARMS} sparse ones",
    )
    parser.add_argument("--arm", choices=("hf", "spath"), help=argparse.SUPPRESS)
    return parser.parse_args()


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in BENCHMARKS]:
        raise argparse.ArgumentTypeError(f"unknown task {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    return chosen


def comparisons(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of the table per model and benchmark."""
    for folder in options.model:
        plain, spath = load_arms(folder, options.max_length)
        for name in options.tasks:
            requests = build_requests(name, options)
            rounds = take_turns(plain, spath, requests, options)
            yield describe(folder, name, requests, plain.batch_size_per_gpu, rounds) | {
                f"{arm} MiB": mebibytes(peak)
                for arm, peak in zip(("hf", "spath"), peaks(folder, name, plain, rounds, options), strict=True)
            }


def whole_jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of the table per model."""
    for folder in options.model:
        plain, spath = load_arms(folder, options.max_length)
        requests = [request for name in WHOLE_JOB for request in build_requests(name, options)]
        job = partial(all_arms, spath, find_sites(spath.model), requests)
        rounds = take_turns(plain, spath, requests, options, job)
        title = f"{'+'.join(WHOLE_JOB)}: dense / dense + {SPARSE_ARMS} sparse"
        yield describe(folder, title, requests, plain.batch_size_per_gpu, rounds)


def all_arms(lm: Any, sites: Sequence[Any], requests: Sequence[Any]) -> Sequence[Any]:
    """The dense answers; the sparse arms are run as well, from making their masks on."""
    import torch

    from spath_eval.masks import remove_lowest
    from spath_eval.pathways import StaticPathway

    dense = ask(lm, requests)
    for seed in range(SPARSE_ARMS):
        generator = torch.Generator().manual_seed(seed)
        scores = {site.path: torch.rand(site.shape, generator=generator) for site in sites}
        with StaticPathway(sites, remove_lowest(scores, SPARSITY), "compact").applied():
            ask(lm, requests)
    return dense


def run_one_arm(options: argparse.Namespace) -> None:
    """Answer the requests in this process and print its peak of memory."""
    plain, spath = load_arms(options.model[0], options.max_length)
    requests = build_requests(options.tasks[0], options)
    plain.batch_size_per_gpu = options.batch_sizes[0]
    ask(plain if options.arm == "hf" else spath, requests)
    print(peak_rss())


def load_arms(folder: str, max_length: int | None) -> tuple[Any, Any]:
    """lm-eval's model and ours around the same weights."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from spath_eval.quality.scorer import SpathLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = {"softmax_dtype": torch.float32, "max_length": max_length}
    plain = HFLM(str(folder), device=device, dtype=dtype, **settings)
    return plain, SpathLM(plain.model, tokenizer=plain.tokenizer, device=device, batch_size=ROWS, **settings)


def find_sites(model: Any) -> list[Any]:
    from spath_eval.models import find_architecture
    from spath_eval.registry import Registry

    return find_architecture(Registry.load(), model.config, "auto").sites(model)


def build_requests(name: str, options: argparse.Namespace) -> list[Any]:
    """The requests that lm-eval makes of the first documents of a benchmark's tasks."""
    from lm_eval.api.samplers import FirstNSampler

    from spath_eval.quality.benchmarks import load_tasks

    benchmark = BENCHMARKS[name]
    requests: list[Any] = []
    for task in load_tasks(benchmark.tasks, data_dir=options.data_dir, num_fewshot=benchmark.num_fewshot).values():
        if benchmark.first_n:
            task.sampler = FirstNSampler(task.sampler.df)
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=options.documents or benchmark.documents)
        requests += task.instances
    return requests


def by_document(requests: Sequence[Any]) -> list[list[Any]]:
    documents: dict[tuple[str, int], list[Any]] = {}
    for request in requests:
        documents.setdefault((request.task_name, request.doc_id), []).append(request)
    return list(documents.values())


def best_batch(lm: Any, requests: Sequence[Any], sizes: Sequence[int]) -> int:
    """The fastest batch size on the documents of middle length, among which padding is as little as among all."""
    import torch

    kind = requests[0].request_type
    if kind == "loglikelihood_rolling":  # one page fills a forward, and several need the logits of all at once
        return 1
    documents = sorted(by_document(requests), key=lambda document: len(document[0].args[0]))
    start = max(len(documents) - sizes[-1], 0) // 2
    subset = [request for document in documents[start : start + sizes[-1]] for request in document]
    ask(lm, subset[:1])
    timings: dict[int, float] = {}
    for size in sorted({min(size, len(subset)) for size in sizes}):
        if timings and kind == "loglikelihood" and not logits_fit(lm, subset, size):
            break
        lm.batch_size_per_gpu = size
        try:
            timings[size] = timed(lm, subset).seconds
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        say(f"{requests[0].task_name}: {len(subset)} requests with batch size {size}: {timings[size]:.2f} s")
    return min(timings, key=timings.__getitem__)


def logits_fit(lm: Any, requests: Sequence[Any], size: int) -> bool:
    """Whether logits and log-softmax of a batch take less than half of the CPU's memory, beyond which a process dies
    without an exception. On CUDA there is one."""
    if lm.device.type != "cpu":
        return True
    longest = max(len(lm.tok_encode("".join(request.args))) for request in requests)
    needed = 2 * 4 * size * longest * lm.model.config.get_text_config().vocab_size
    return needed < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def take_turns(
    plain: Any,
    spath: Any,
    requests: Sequence[Any],
    options: argparse.Namespace,
    job: Callable[[], Sequence[Any]] | None = None,
) -> list[tuple[Timing, Timing]]:
    """Both arms in every round, one round beginning with the one and the next with the other.

    `job` is what `spath` does instead of answering the requests once.
    """
    plain.batch_size_per_gpu = best_batch(plain, requests, options.batch_sizes)
    for lm in (plain, spath):
        ask(lm, by_document(requests)[0])
    rounds = []
    for number in range(options.rounds):
        if number % 2 == 0:
            first = timed(plain, requests)
            both = first, timed(spath, requests, job)
        else:
            second = timed(spath, requests, job)
            both = timed(plain, requests), second
        say(f"round {number + 1}: hf {both[0].seconds:.2f} s, spath {both[1].seconds:.2f} s")
        rounds.append(both)
    return rounds


def timed(lm: Any, requests: Sequence[Any], job: Callable[[], Sequence[Any]] | None = None) -> Timing:
    """Answer the requests, by `job` where there is one, with nothing known from before."""
    import torch

    for known in ("_encoded", "_plans"):
        getattr(lm, known, {}).clear()
    gc.collect()
    on_device = lm.device.type == "cuda"
    if on_device:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    answers = job() if job else ask(lm, requests)
    if on_device:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Timing(seconds, answers, torch.cuda.max_memory_allocated() if on_device else None)


def ask(lm: Any, requests: Sequence[Any]) -> Sequence[Any]:
    return getattr(lm, requests[0].request_type)(list(requests), disable_tqdm=True)


def compare(requests: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any]) -> Differences:
    kind = requests[0].request_type
    if kind == "generate_until":
        return Differences(None, sum(a != b for a, b in zip(ours, theirs, strict=True)))
    if kind == "loglikelihood_rolling":
        per_word = [abs(a - b) / len(r.args[0].split()) for r, a, b in zip(requests, ours, theirs, strict=True)]
        return Differences(max(per_word), sum(not difference <= PERPLEXITY_TOLERANCE for difference in per_word))
    answers = {id(request): pair for request, *pair in zip(requests, ours, theirs, strict=True)}
    other = 0
    for document in by_document(requests):
        one, two = zip(*(answers[id(request)] for request in document), strict=True)
        other += choice(one) != choice(two)
    return Differences(max(abs(a[0] - b[0]) for a, b in answers.values()), other)


def choice(answers: Sequence[tuple[float, bool]]) -> int:
    """The most likely of several continuations; of a single one, whether greedy decoding gives it."""
    if len(answers) == 1:
        return int(answers[0][1])
    return max(range(len(answers)), key=lambda index: answers[index][0])


def describe(
    folder: str, name: str, requests: Sequence[Any], batch: int, rounds: Sequence[tuple[Timing, Timing]]
) -> dict[str, Any]:
    """A row of the table."""
    different = [compare(requests, plain.answers, spath.answers) for plain, spath in rounds]
    largest = [d.largest for d in different if d.largest is not None]
    return {
        "model": Path(folder).name,
        "task": name,
        "documents": len(by_document(requests)),
        "hf batch": batch,
        "hf s": f"{statistics.median(plain.seconds for plain, _ in rounds):.2f}",
        "spath s": f"{statistics.median(spath.seconds for _, spath in rounds):.2f}",
        "ratio": ratios(rounds),
        "largest difference": f"{max(largest):.1e}" if largest else "-",
        "other answers": max(d.documents for d in different),
    }


def ratios(rounds: Sequence[tuple[Timing, Timing]]) -> str:
    values = [plain.seconds / spath.seconds for plain, spath in rounds]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def peaks(
    folder: str, name: str, plain: Any, rounds: Sequence[tuple[Timing, Timing]], options: argparse.Namespace
) -> list[int | None]:
    """Bytes that either arm needed at most, where that can be told: on CUDA, and with `--memory`."""
    if plain.device.type == "cuda":
        return [max(timing.peak or 0 for timing in arm) for arm in zip(*rounds, strict=True)]
    if not options.memory:
        return [None, None]
    return [memory_of(arm, folder, name, plain.batch_size_per_gpu, options) for arm in ("hf", "spath")]


def memory_of(arm: str, folder: str, name: str, batch: int, options: argparse.Namespace) -> int:
    """The peak of resident memory of a process that loads the model and answers the requests with one arm."""
    command = [sys.executable, __file__, "--arm", arm, "--model", folder, "--data-dir", str(options.data_dir)]
    command += ["--tasks", name, "--batch-sizes", str(batch)]
    for option, value in (("--documents", options.documents), ("--max-length", options.max_length)):
        command += [option, str(value)] if value else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
