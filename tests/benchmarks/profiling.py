"""Times the profiling of a domain's text beside a plain forward over the same batches, and finds its peak of memory.

    python tests/benchmarks/profiling.py --model FOLDER --profile-text FILE [--tokens 2000] [--rounds 9]
    python tests/benchmarks/profiling.py --model FOLDER --profile-text FILE --memory

Both arms are in one process, on one model (float32 on the CPU, bfloat16 on CUDA), read and tokenise the same text, and
take turns round by round, so that what disturbs the machine disturbs both. The forward has no output head, without
which its time is least. A ratio is profiling over plain forward within a round: the median, and in brackets its
distribution-free 95% interval (of fewer than 6 rounds, the smallest and the largest). On the CPU there is a second one
of processor seconds, which leave out the time that other programs had.

With `--memory` the peaks of two processes are shown, one for 10,000 and one for 200,000 tokens, and what they needed
before. How large the largest batch is must not depend on that, so that there the text is cut into documents of one
length, about a row each. Weights are read from their file beforehand, which else happens as tokens first occur, and
glibc is told to give back what is freed in blocks of a MiB or more, which else it keeps or not, as the order of sizes
has it. The result goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment, peak_rss, quiet, say

MEMORY_TOKENS = (10_000, 200_000)
CHARACTERS = 2_000
"""Of a document when memory is measured: 400 to 600 tokens of English."""


@dataclass(frozen=True)
class Seconds:
    """How long an arm took."""

    wall: float
    processor: float


def main() -> None:
    options = parse_options()
    quiet()

    if options.peak:
        profile_once(options)
        return
    print(environment(), flush=True)
    rows = list(peaks(options) if options.memory else [timings(options)])
    import tabulate

    print(tabulate.tabulate(rows, headers="keys", disable_numparse=True, stralign="right"))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--profile-text", type=Path, required=True, metavar="FILE", help="or a folder of files")
    parser.add_argument("--tokens", type=int, default=2_000, metavar="N", help="of a round (default: 2000)")
    parser.add_argument("--rounds", type=int, default=9, metavar="R", help="of both arms (default: 9)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows of a forward (default: 32)")
    parser.add_argument("--statistics", default="mean_abs", metavar="A,B", help="what is collected (default: mean_abs)")
    parser.add_argument("--memory", action="store_true", help="show the two peaks of memory instead of the ratio")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def timings(options: argparse.Namespace) -> dict[str, str]:
    """The row of the table."""
    from spath_eval.profiling import forward_backbone, profile_domain
    from spath_eval.texts import batches, read_corpus

    model, tokenizer, sites = load(options.model)
    corpus = read_corpus(options.profile_text)
    size = {"tokens": options.tokens, "batch_size": options.batch_size}
    names = options.statistics.split(",")

    def plain() -> None:
        import torch

        with torch.inference_mode():
            for batch in batches(tokenizer, corpus.profile, **size):
                forward_backbone(model, batch)

    def profiled() -> None:
        profile_domain(model, tokenizer, sites, "text", corpus, names, **size)

    rounds = take_turns(plain, profiled, options.rounds, model.device)
    row = {
        "model": Path(options.model).name,
        "text": options.profile_text.name,
        "statistics": options.statistics,
        "tokens": str(options.tokens),
        "batch": str(options.batch_size),
        "rounds": str(options.rounds),
        "ratio": ratio([(a.wall, b.wall) for a, b in rounds]),
    }
    if model.device.type == "cpu":
        row["ratio of processor s"] = ratio([(a.processor, b.processor) for a, b in rounds])
    return row


def take_turns(
    plain: Callable[[], None], profiled: Callable[[], None], rounds: int, device: Any
) -> list[tuple[Seconds, Seconds]]:
    """Both arms in every round, one round beginning with the one and the next with the other, after one to warm up."""
    found = []
    for number in range(rounds + 1):
        arms = [plain, profiled] if number % 2 else [profiled, plain]
        seconds = {arm: timed(arm, device) for arm in arms}
        both = seconds[plain], seconds[profiled]
        say(f"round {number or 'to warm up'}: plain {both[0].wall:.2f} s, profiled {both[1].wall:.2f} s")
        found.append(both)
    return found[1:]


def timed(arm: Callable[[], None], device: Any) -> Seconds:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def ratio(rounds: list[tuple[float, float]]) -> str:
    """Of the second over the first of each round."""
    from spath_eval.speed.timing import PhaseTimes

    plain, profiled = zip(*rounds, strict=True)
    times = PhaseTimes(dense_seconds=profiled, sparse_seconds=plain)  # it divides the former by the latter
    low, high = times.ci95
    return f"{times.ratio:.3f} ({low:.3f}-{high:.3f})"


def load(folder: str) -> tuple[Any, Any, list[Any]]:
    """The model, its tokenizer and its sites."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spath_eval.models import find_architecture
    from spath_eval.registry import Registry

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).eval()
    sites = find_architecture(Registry.load(), model.config, "auto").sites(model)
    return model, AutoTokenizer.from_pretrained(folder), sites


def peaks(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A row of the table per number of tokens, each found in a process of its own."""
    for tokens in MEMORY_TOKENS:
        command = [sys.executable, __file__, "--peak", "--model", options.model, "--tokens", str(tokens)]
        command += ["--profile-text", str(options.profile_text), "--batch-size", str(options.batch_size)]
        command += ["--statistics", options.statistics]
        giving_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=giving_back)
        counted, loaded, peak = map(int, done.stdout.split())
        yield {
            "model": Path(options.model).name,
            "text": options.profile_text.name,
            "statistics": options.statistics,
            "tokens": str(counted),
            "batch": str(options.batch_size),
            "MiB before": f"{loaded / 2**20:.1f}",
            "MiB at the peak": f"{peak / 2**20:.1f}",
        }


def profile_once(options: argparse.Namespace) -> None:
    """Profile in this process, and print the number of tokens and the peaks of memory before and after it."""
    import torch

    from spath_eval.profiling import profile_domain
    from spath_eval.texts import Corpus, read_corpus

    model, tokenizer, sites = load(options.model)
    corpus = read_corpus(options.profile_text)
    text = "\n\n".join(corpus.profile)
    documents = tuple(text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS))
    corpus = Corpus(documents, (), corpus.source)
    for weights in model.parameters():
        weights.sum()
    peak = torch.cuda.max_memory_allocated if model.device.type == "cuda" else peak_rss
    before = peak()
    part = profile_domain(
        model,
        tokenizer,
        sites,
        "text",
        corpus,
        options.statistics.split(","),
        tokens=options.tokens,
        batch_size=options.batch_size,
    )
    print(part.tokens, before, peak())


if __name__ == "__main__":
    main()
