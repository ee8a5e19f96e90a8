"""Times an FFN of a published shape, dense and sparse, beside 1/(1 - sparsity), which is the most there can be.

    python tests/benchmarks/ffn.py [--shape gemma-2b] [--sparsity 0.3,0.5,0.7] [--batch 1,128] [--seconds 60]

Random weights, float32 on the CPU and bfloat16 on CUDA; both arms take turns in one process. At batch 1 the ratio has
to reach 0.95 of that, at larger batches 0.85; where it does not, the exit status is 1. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys

REQUIRED = {True: 0.95, False: 0.85}
"""Share of 1/(1 - sparsity), at batch 1 and above."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", default="gemma-2b", metavar="NAME", help="default: gemma-2b")
    parser.add_argument("--sparsity", default="0.3,0.5,0.7", metavar="A,B", help="default: 0.3,0.5,0.7")
    parser.add_argument("--batch", default="1,128", metavar="A,B", help="tokens at a time (default: 1,128)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of a ratio, at most (default: 60)")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from spath_eval.registry import Registry
    from spath_eval.speed.benchmark import Plan, run
    from spath_eval.speed.shapes import Cut, find_shape
    from spath_eval.speed.sources import of_shape
    from spath_eval.speed.table import render, timings
    from spath_eval.speed.timing import Stop, Workload

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    workloads = tuple(Workload(int(batch), 1, 1) for batch in options.batch.split(","))
    subjects = of_shape(
        *find_shape(Registry.load().architectures.values(), options.shape),
        Cut(layers=1),
        ("ffn",),
        [float(part) for part in options.sparsity.split(",")],
        ("random",),
        seed=0,
        device=torch.device(device),
        dtype=dtype,
        largest=workloads[-1],
    )
    plan = Plan(workloads, Stop(options.seconds, 0.02, max_rounds=2_000))
    entries = list(
        run(subjects, plan, torch.device(device), dtype, lambda line: print(line, file=sys.stderr, flush=True))
    )
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}")
    print(render(entries, 140))
    failed = 0
    for entry, _, timing in timings(entries):
        share, required = timing["ratio"] * (1 - entry["sparsity"]), REQUIRED[timing["batch"] == 1]
        failed += share < required
        verdict = "as required" if share >= required else f"below {required}"
        print(f"sparsity {entry['sparsity']:.3f}, batch {timing['batch']}: {share:.3f} of 1/(1 - sparsity), {verdict}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
