"""Times an FFN of a published shape, dense and by the kernels that skip token by token, both as CUDA graphs.

    python tests/gpu/token_kernels.py [--shape gemma-2b,Llama-3.1-8B] [--sparsity 0.3,0.5] [--batch 1,8]

Random weights, bfloat16; thresholds are those of the strategies on random tokens. Arms take turns in one process. A
ceiling counts the bytes of the weights that a batch needs: of `cats` all of gate, of `teal` all of gate and up, so that
at a sparsity of 50% and batch 1 no ratio is above 1.5 and 1.2. Exit status 1 where the kernels do not compute what
masking does. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

REPEATS = 20
"""Calls that are timed together, since one takes some ten microseconds."""
TOKENS = 256
"""Of the random text that thresholds are taken from."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", default="gemma-2b,Llama-3.1-8B", metavar="A,B")
    parser.add_argument("--sparsity", default="0.3,0.5", metavar="A,B")
    parser.add_argument("--batch", default="1,8", metavar="A,B", help="tokens at a time")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of a ratio, at most")
    options = parser.parse_args()

    import tabulate
    import torch

    if not torch.cuda.is_available():
        print("the kernels need a CUDA device", file=sys.stderr)
        return 1
    rows = [
        row
        for shape in options.shape.split(",")
        for sparsity in map(float, options.sparsity.split(","))
        for row in measured(shape, sparsity, [int(batch) for batch in options.batch.split(",")], options.seconds)
    ]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(tabulate.tabulate(rows, headers="keys", floatfmt=".3f"))
    return int(any(row["equal"] == "no" for row in rows))


def measured(shape: str, sparsity: float, batches: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """A row of the table for each strategy and batch."""
    import torch

    from spath_eval import Budget, Context
    from spath_eval.pathways import PARITY_TOLERANCE, TokenPathway
    from spath_eval.plugins.strategies.cats import Cats
    from spath_eval.plugins.strategies.teal import Teal
    from spath_eval.registry import Registry
    from spath_eval.speed.kernels import KernelPathway
    from spath_eval.speed.shapes import Cut, build, find_shape
    from spath_eval.speed.timing import Arm, Stop, random_tokens, take_turns

    family, reference = find_shape(Registry.load().architectures.values(), shape)
    model = build(reference, Cut(1), device="cuda", dtype=torch.bfloat16)
    (site,) = family.sites(model)
    text = random_tokens(model, 1, TOKENS, 0)
    ones = torch.ones_like(text)
    generator = torch.Generator()
    context = Context(
        "math", Budget(sparsity), {site.path: site}, None, generator, model, ({"input_ids": text},), (ones.bool(),)
    )
    for strategy in (Cats(), Teal()):
        pathway = TokenPathway([site], strategy, context)
        kernels = KernelPathway(pathway)
        for batch in batches:
            inputs = hidden_states(model, site, batch)
            with torch.inference_mode():
                pathway.kept = pathway.total = 0
                with pathway.applied():
                    expected = site.module(inputs)
                with kernels.applied():
                    found = site.module(inputs)
                difference = float((found - expected).abs().max() / expected.abs().max())
                dense = graph(lambda inputs=inputs: site.module(inputs))
                with kernels.applied():
                    skipping = graph(lambda inputs=inputs: site.module(inputs))
            rounds = take_turns({"dense": Arm(timed(dense))}, {"kernels": Arm(timed(skipping))}, Stop(seconds, 0.02))
            times = rounds.compared("kernels", 0)
            whole = site.weight_bytes(None)
            row: dict[str, Any] = {
                "shape": shape,
                "strategy": strategy.name,
                "batch": batch,
                "skipped": pathway.achieved,
                "dense, us": 1e6 * sorted(times.dense_seconds)[times.rounds // 2],
                "ratio": times.ratio,
                "95%": "{:.3f}-{:.3f}".format(*times.ci95),
                "ceiling": whole / (whole - kernels.skippable_bytes * pathway.achieved) if batch == 1 else None,
                "equal": "yes" if difference <= PARITY_TOLERANCE[torch.bfloat16] else "no",
            }
            yield row


def hidden_states(model: Any, site: Any, tokens: int) -> Any:
    """What the site is called with for the last `tokens` of a random text."""
    import torch

    from spath_eval.speed.timing import random_tokens

    seen: list[Any] = []
    with ExitStack() as stack, torch.inference_mode():
        handle = site.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        stack.callback(handle.remove)
        model.get_decoder()(input_ids=random_tokens(model, 1, TOKENS, 1))
    return seen[0][0, -tokens:].clone()


def graph(function: Callable[[], Any]) -> Callable[[], None]:
    """`function` as a CUDA graph, to be replayed."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        function()
    return recorded.replay


def timed(function: Callable[[], None]) -> Callable[[], list[float]]:
    """Seconds of a call, over `REPEATS` of them."""
    import torch

    from spath_eval.speed.timing import start_stopwatch

    def run() -> list[float]:
        stopwatch = start_stopwatch(torch.device("cuda"))
        for _ in range(REPEATS):
            function()
        stopwatch.mark()
        return [lap / REPEATS for lap in stopwatch.laps()]

    return run


if __name__ == "__main__":
    sys.exit(main())
