"""Nothing is fetched from a network in tests, and what is marked `gpu` runs only where there is one."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spath_eval.testing import SIZES

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing by more, and lose much on a busy machine
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1")

pytest_plugins = "pytester"

Distribute = Callable[..., Path]


SLOWEST = ("test_real_models.py", "test_readme.py", "test_session.py", "test_new_plugin.py", "test_baselines.py")
"""Files that take a minute or more. They come first: were they last, one worker would run them while others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distribute:
    """Install a distribution for the length of a test: `distribute(name, entry_points, modules, version="1.0")`.

    `entry_points` maps names to modules, and `modules` modules to their source. The distribution lies on the Python
    path, in the same form in which pip installs one.
    """
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(
        name: str, entry_points: Mapping[str, str], modules: Mapping[str, str], *, version: str = "1.0"
    ) -> Path:
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines = ["[spath_eval]", *(f"{point} = {module}" for point, module in entry_points.items())]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        return folder

    yield install
    for module in set(sys.modules) - known:
        if Path(getattr(sys.modules[module], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[module]


@pytest.fixture
def sample_plugin(distribute: Distribute) -> Path:
    """The package in `tests/sample_plugin`, installed for the length of a test; the path of its `dist-info`."""
    import tomllib

    folder = Path(__file__).parent / "sample_plugin"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry_points = project["entry-points"]["spath_eval"]
    modules = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in entry_points.values()}
    return distribute(project["name"], entry_points, modules, version=project["version"])


WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
TINY: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "intermediate_size": [64, 48, 80],
        "activation_sparsity_pattern": [0.3, 0.0, 0.0],
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        **WINDOWS,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
    },
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "llama+mlp_bias": {"mlp_bias": True},
    "mistral": {},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {
        **WINDOWS,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
    },
    "kimi_k25": DEEPSEEK,
}
TINY["gemma4_text+experts"] = TINY["gemma4_text"] | {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
"""What the configuration of each model type, or of a variant of it, has besides `SIZES`."""


def tiny_configuration(kind: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of the configuration of a tiny model."""
    configuration = {key: value for key, value in {**SIZES, **TINY[kind], **changes}.items() if value is not None}
    if kind != "kimi_k25":
        return configuration
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"text_config": configuration, "vision_config": vision}


def build_tiny_model(kind: str = "gemma", *, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised model of the real class of a model type, or of a variant of it, `TYPE+VARIANT`.

    Three layers, hidden size 32, a vocabulary of 100, and of routed experts 8 with 24 neurons, two for each token.
    Those of gemma3n and gemma4 differ in width, and the first one of gemma3n has the activation sparsity built in.
    Weights are larger than usual, so that differences are not lost in rounding, and biases are random as well.
    """
    import torch
    import transformers

    model_type, auto_class = kind.partition("+")[0], "AutoModelForCausalLM"
    if model_type == "kimi_k25":
        auto_class = "AutoModelForImageTextToText"
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **tiny_configuration(kind, **changes))
    model = getattr(transformers, auto_class).from_config(config).eval().requires_grad_(False)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("bias"):
            tensor.normal_(std=0.2)
        elif name.endswith("per_expert_scale"):
            tensor.uniform_(0.5, 1.5)
    return model


def float64_activations(module: Any, inputs: Any, experts: Any = None) -> Any:
    """What enters the down projection of an FFN for `inputs` `[rows, hidden]`, computed from the raw weights alone.

    Of a module of routed experts, row by row that of the given expert. The activation function is written out here.
    """
    import numpy as np
    from scipy.stats import norm

    def raw(parameter: Any) -> Any:
        return parameter.detach().double().numpy()

    def activated(gate: Any) -> Any:
        if type(module).__name__.startswith(("Gemma", "PhiMLP")):
            return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return gate / (1 + np.exp(-gate))

    def projected(name: str) -> Any:
        projection = getattr(module, name)
        return x @ raw(projection.weight).T + (0 if projection.bias is None else raw(projection.bias))

    x = raw(inputs).reshape(-1, inputs.shape[-1])
    if experts is not None:
        rows = []
        for expert, row in zip(experts.tolist(), x, strict=True):
            weight = raw(module.gate_up_proj[expert])
            if type(module).__name__ == "GptOssExperts":  # transposed, biased, in turn, clamped
                both = row @ weight + raw(module.gate_up_proj_bias[expert])
                limit = module.config.swiglu_limit
                gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
                rows.append((up + 1) * gate / (1 + np.exp(-1.702 * gate)))
            else:
                gate, up = np.split(weight @ row, 2)
                rows.append(activated(gate) * up)
        return np.array(rows)
    if hasattr(module, "fc1"):
        return activated(projected("fc1"))
    if hasattr(module, "gate_up_proj"):
        gate, up = np.split(projected("gate_up_proj"), 2, axis=1)
        return activated(gate) * up
    gate = projected("gate_proj")
    if share := getattr(module, "activation_sparsity", 0.0):
        cutoff = gate.mean(-1, keepdims=True) + gate.std(-1, keepdims=True) * norm.ppf(share)
        gate = np.maximum(gate - cutoff, 0)
    return activated(gate) * projected("up_proj")


@pytest.fixture(scope="session")
def tiny_model():
    """`build_tiny_model`; `tiny_model.kinds` are the model types and variants that it knows, and
    `tiny_model.configuration` is `tiny_configuration`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more than one only costs time at this size
    build_tiny_model.kinds = tuple(TINY)
    build_tiny_model.configuration = tiny_configuration
    yield build_tiny_model
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference_activations():
    """`float64_activations`."""
    return float64_activations


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A real tokenizer of 100 words `w4` ... `w99`, which puts `<bos>` in front of a text: `w7` has the id 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{number}" for number in range(4, 100))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a randomly initialised Gemma of two layers, with the tokenizer of the project's own models."""
    import torch
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

    from spath_eval import plugins

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(Path(plugins.__file__).parent / "zoo" / "tokenizer")
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left behind."""

    status: int
    out: str
    err: str

    @property
    def record_path(self) -> Path:
        """Where stderr says the record is."""
        return Path(re.findall(r"^record: (.+)$", self.err, flags=re.MULTILINE)[-1])

    @property
    def record(self) -> dict[str, Any]:
        """The record, which is checked against the schema."""
        from spath_eval import records

        record = records.read(self.record_path)
        records.validate(record)
        return record

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of the samples file that lies beside the record."""
        text = self.record_path.with_suffix(".samples.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def spath_eval_command() -> Callable[..., Outcome]:
    """Calls `spath-eval` in this process: `spath_eval_command("run", ...)` is its outcome.

    What is logged goes to stderr, as in a process of its own.
    """
    from spath_eval.cli import main

    def call(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        logged = logging.StreamHandler(err)
        logged.setLevel(logging.WARNING)
        logged.setFormatter(logging.Formatter("warning: %(message)s"))
        logging.getLogger().addHandler(logged)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                status = main([str(argument) for argument in arguments])
        finally:
            logging.getLogger().removeHandler(logged)
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an empty profile cache outside of it."""
    folder = tmp_path / "work_folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 80 short documents, to profile on quickly."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("\n\n".join(f"Line {n} says that {n} plus {n} is {2 * n}." for n in range(80)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def brief(short_text: Path) -> list[str]:
    """Options that make a run on the domain math take a second or two."""
    options = "--domain math --limit 4 --profile-tokens 600 --preservation-tokens 300 --batch-size 8 --no-speed"
    return [*options.split(), "--profile-text", f"math={short_text}"]


@pytest.fixture
def run(
    spath_eval_command: Callable[..., Outcome], work_folder: Path, tiny_checkpoint: Path, brief: list[str]
) -> Callable[..., Outcome]:
    """Calls `spath-eval run` on the tiny checkpoint with the brief options, and with those given, which win."""
    return lambda *arguments: spath_eval_command("run", "--model", tiny_checkpoint, *brief, *arguments)
