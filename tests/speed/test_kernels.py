"""Kernels against float64: in Triton's interpreter, in a process of its own, or on a GPU where there is one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spath_eval import Budget, Context, UsageError
from spath_eval.pathways import PARITY_TOLERANCE, TokenPathway
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.llama import LLAMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.architectures.phi import PHI
from spath_eval.plugins.strategies.cats import Cats
from spath_eval.plugins.strategies.oracle import Oracle
from spath_eval.plugins.strategies.teal import Teal
from spath_eval.texts import batches

pytest.importorskip("triton", reason="the extra [kernels] is not installed")

from spath_eval.speed import kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH, HIDDEN = 549, 150
"""Neither is a multiple of a block, and down is summed in several pieces."""


@pytest.mark.skipif(kernels.INTERPRETED, reason="this is that process")
@pytest.mark.skipif(GPU, reason="the kernels run on the GPU")
def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, kernels.MAX_TOKENS])
def test_the_kernels_compile_without_a_gpu(capability, dtype, tokens, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = kernels._rows_kernel, kernels.ROWS_BLOCKS[tokens], dtype
    columns = kernels._columns_kernel, kernels.COLUMNS_BLOCKS[tokens], "fp32"
    for kernel, constants, result in (rows, columns):
        constants = constants | {"BLOCK_TOKENS": tokens, "hidden": 2048, "UPCAST": False}
        types = {"inputs": f"*{dtype}", "weight": f"*{dtype}", "keep": "*u8", "outputs": f"*{result}"}
        signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        assert ("mma" in compiled.asm["ptx"]) == (tokens > 1 and dtype != "fp32")


@pytest.mark.skipif(kernels.INTERPRETED or GPU, reason="the kernels run here")
def test_a_model_on_a_cpu_is_refused(tiny_model):
    with pytest.raises(UsageError, match="lies on cpu: the kernels need a CUDA device"):
        kernels.KernelPathway(TokenPathway(GEMMA.sites(tiny_model("gemma")), Oracle(), context({}, 0.5)))


def context(sites, sparsity, model=None, calibration=()):
    inputs = tuple(batch.inputs(model.device) for batch in calibration)
    counted = tuple(batch.counted.to(model.device) for batch in calibration)
    return Context("math", Budget(sparsity), sites, None, torch.Generator(), model, inputs, counted)


def draw(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_kept(tokens, width=WIDTH):
    """About 40%, and never the last three neurons."""
    keep = torch.rand(tokens, width, generator=torch.Generator().manual_seed(9)) < 0.4
    keep[:, -3:] = False
    return keep


def check(found, inputs, weight, kept):
    """Against `inputs @ weight` in float64, where `kept`: within a unit in the last place, and the sums' rounding.

    (A GPU rounds to bfloat16 to the nearest; the interpreter cuts off.)
    """
    inputs, weight = inputs.double(), weight.double()
    expected, size = inputs @ weight, inputs.abs() @ weight.abs()
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-6 * size
    assert ((found.cpu().double() - expected)[kept].abs() <= allowed[kept]).all()
    assert not found.cpu()[~kept].any()


class TestWhereKernelsRun:
    __test__ = kernels.INTERPRETED or GPU

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 3, kernels.MAX_TOKENS + 1])
    def test_kept_rows_are_those_of_the_product(self, dtype, tokens):
        inputs, weight = draw(tokens, HIDDEN, dtype=dtype, seed=1), draw(WIDTH, HIDDEN, dtype=dtype, seed=2)
        keep = draw_kept(tokens)
        found = kernels.kept_rows(inputs.to(DEVICE), weight.to(DEVICE), keep.to(DEVICE))
        assert (found.dtype, found.shape) == (dtype, (tokens, WIDTH))
        check(found, inputs, weight.T, keep)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 3, kernels.MAX_TOKENS + 1])
    def test_kept_columns_are_summed_up(self, dtype, tokens):
        inputs, weight = draw(tokens, WIDTH, dtype=dtype, seed=3), draw(WIDTH, HIDDEN, dtype=dtype, seed=4)
        keep = draw_kept(tokens)
        found = kernels.kept_columns(inputs.to(DEVICE), weight.to(DEVICE), keep.to(DEVICE))
        assert (found.dtype, found.shape) == (dtype, (tokens, HIDDEN))
        check(found, inputs * keep, weight, torch.ones(tokens, HIDDEN, dtype=torch.bool))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, 5])
    def test_what_no_token_keeps_is_not_read(self, dtype, tokens):
        keep = draw_kept(tokens)
        weight = draw(WIDTH, HIDDEN, dtype=dtype, seed=2)
        weight[~keep.any(0)] = torch.nan
        hidden, product = draw(tokens, HIDDEN, dtype=dtype, seed=1), draw(tokens, WIDTH, dtype=dtype, seed=3)
        product[~keep] = torch.nan
        for kernel, inputs in ((kernels.kept_rows, hidden), (kernels.kept_columns, product)):
            assert kernel(inputs.to(DEVICE), weight.to(DEVICE), keep.to(DEVICE)).isfinite().all()

    def test_nothing_kept_gives_zeros(self):
        inputs, weight, keep = torch.ones(1, 20), torch.ones(30, 20), torch.zeros(1, 30, dtype=torch.bool)
        assert not kernels.kept_rows(inputs.to(DEVICE), weight.to(DEVICE), keep.to(DEVICE)).any()
        assert not kernels.kept_columns(torch.ones(1, 30, device=DEVICE), weight.to(DEVICE), keep.to(DEVICE)).any()

    def test_equal_calls_have_equal_results(self):
        inputs, weight, keep = (
            draw(1, WIDTH, dtype=torch.float16, seed=3),
            draw(WIDTH, HIDDEN, dtype=torch.float16, seed=4),
            draw_kept(1),
        )
        first, second = (kernels.kept_columns(inputs.to(DEVICE), weight.to(DEVICE), keep.to(DEVICE)) for _ in range(2))
        assert torch.equal(first, second)

    def test_what_does_not_fit_is_refused(self):
        inputs, weight, keep = torch.ones(1, 20), torch.ones(30, 20), torch.ones(1, 30, dtype=torch.bool)
        for wrong in (
            (inputs[:, 1:], weight, keep),
            (inputs, weight, keep[:, 1:]),
            (inputs, weight, keep.int()),
            (inputs.half(), weight, keep),
            (inputs.double(), weight.double(), keep),
            (inputs, torch.ones(20, 30).T, keep),
        ):
            with pytest.raises(ValueError, match=r"fit together|are of|do not lie"):
                kernels.kept_rows(*wrong)

    def test_experts_are_refused(self, tiny_model):
        sites = MOE.sites(tiny_model("qwen3_moe"))
        with pytest.raises(UsageError, match="the kernels do not know routed experts"):
            kernels.KernelPathway(TokenPathway(sites, Oracle(), context({}, 0.5)))


FAMILIES = {"gemma": GEMMA, "gemma3n_text": GEMMA, "llama+mlp_bias": LLAMA, "phi3": PHI, "phi": PHI}
STRATEGIES = {"teal": Teal(), "cats": Cats(), "oracle": Oracle()}
PAIRS = [(kind, name) for kind in FAMILIES for name in STRATEGIES if (kind, name) != ("phi", "cats")]


@pytest.fixture(scope="module")
def calibration(tiny_tokenizer):
    generator = random.Random(0)
    documents = [" ".join(f"w{generator.randrange(4, 100)}" for _ in range(20)) for _ in range(8)]
    return list(batches(tiny_tokenizer, documents, tokens=1000, batch_size=4))


@pytest.fixture
def pathway(tiny_model, calibration):
    def make(kind, name, dtype=torch.float32):
        model = tiny_model(kind).to(device=DEVICE, dtype=dtype)
        sites = FAMILIES[kind].sites(model)
        asked = context({site.path: site for site in sites}, 0.7, model, calibration)
        return TokenPathway(sites, STRATEGIES[name], asked)

    return make


class TestPathwaysWhereKernelsRun:
    __test__ = kernels.INTERPRETED or GPU

    @pytest.mark.parametrize(
        ("kind", "name", "dtype"),
        [(kind, name, torch.float32) for kind, name in PAIRS]
        + [("gemma", name, dtype) for name in STRATEGIES for dtype in DTYPES[1:]],
    )
    @pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 9)])
    def test_each_site_computes_what_it_does_masked(self, pathway, kind, name, dtype, shape):
        masked = pathway(kind, name, dtype)
        skipping = kernels.KernelPathway(masked)
        for site in masked.sites:
            inputs = draw(*shape, 32, dtype=dtype, seed=5).to(DEVICE)
            with torch.inference_mode():
                dense = site.module(inputs)
                with masked.applied():
                    expected = site.module(inputs)
                with skipping.applied():
                    found = site.module(inputs)
                assert torch.equal(site.module(inputs), dense), "afterwards it is dense again"
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert (found - expected).abs().max() <= PARITY_TOLERANCE[dtype] * expected.abs().max()
            assert (dense - expected).abs().max() > PARITY_TOLERANCE[dtype] * expected.abs().max()

    @pytest.mark.parametrize(("kind", "name"), [*(("gemma", name) for name in STRATEGIES), ("phi", "teal")])
    def test_the_model_writes_what_it_does_masked(self, pathway, kind, name):
        masked = pathway(kind, name)
        written = []
        for one in (masked, kernels.KernelPathway(masked)):
            with one.applied():
                prompt = torch.tensor([[2, 7, 9, 11]], device=DEVICE)
                mask = torch.ones_like(prompt)
                options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
                written.append(masked.context.model.generate(prompt, attention_mask=mask, **options).tolist())
        assert written[0] == written[1]

    def test_what_a_token_skips_is_not_read(self, pathway):
        masked = pathway("gemma", "cats")
        skipping = kernels.KernelPathway(masked)
        site, inputs = masked.sites[0], draw(1, 1, 32, dtype=torch.float32, seed=5).to(DEVICE)
        with torch.inference_mode():
            gate = site.module.act_fn(site.module.gate_proj(inputs))[0, 0]
            kept = gate.abs() > masked.context.prepared[site.path]
            with skipping.applied():
                expected = site.module(inputs)
                for projection in (site.module.up_proj, site.module.down_proj):
                    projection.weight[~kept] = torch.nan  # of down, transposed
                assert 0 < int(kept.sum()) < site.width
                assert torch.equal(site.module(inputs), expected)

    @pytest.mark.parametrize("strategy", ["teal", "cats"])
    def test_a_run_measures_their_speed(
        self, strategy, spath_eval_command, work_folder, tiny_checkpoint, brief, monkeypatch
    ):
        from spath_eval.speed import measurement
        from spath_eval.speed.timing import Stop, Workload

        monkeypatch.setattr(measurement, "WORKLOAD", Workload(batch=1, tokens=kernels.MAX_TOKENS + 1, new_tokens=2))
        monkeypatch.setattr(measurement, "Stop", lambda: Stop(seconds=0.0))
        options = [option for option in brief if option != "--no-speed"]
        arguments = ("--strategy", strategy, "--sparsity", 0.5, "--no-controls", "--no-quality")
        outcome = spath_eval_command("run", "--model", tiny_checkpoint, *options, *arguments, "--device", DEVICE)
        assert outcome.status == 0, outcome.err
        (entry,) = outcome.record["cases"][0]["speed"]
        assert entry["subject"] == "model"
        assert entry["prefill"]["ceiling"] == 1
        skippable = {"teal": 1 / 3, "cats": 2 / 3}[strategy]
        share = entry["decode"]["ffn_share"] * skippable * outcome.record["cases"][0]["sparsity"]["achieved"]
        assert entry["decode"]["ceiling"] == pytest.approx(1 / (1 - share), rel=0.1)
