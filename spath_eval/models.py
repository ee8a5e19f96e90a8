"""Loading models: a hub id, a checkpoint folder, a GGUF file, or a family's small trained checkpoint.

Only safetensors and GGUF are read, since a pickle can execute code; remote code stays off. Whatever is wrong with a
model becomes a `UsageError` of one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from spath_eval.contracts import FFN, Architecture, LoadRequest, UsageError
from spath_eval.sites import Site, guess_sites, is_packed, quantisation, stored

if TYPE_CHECKING:
    from spath_eval.registry import Registry

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Ways to spread a model over all devices, as transformers calls them."""


def resolve_device(device: str) -> str:
    """`auto` becomes the first CUDA device where there is one, else the CPU. Raises `UsageError` for an absent one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: use cpu, cuda or cuda:N")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} was asked for, but torch {torch.__version__} finds no CUDA device here")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def check_device_map(device_map: str | None, device: str) -> None:
    """Raises `UsageError` for an unknown way to spread a model, and for a device that is named beside one."""
    if device_map is None:
        return
    if device_map not in DEVICE_MAPS:
        raise UsageError(f"unknown device map {device_map!r}: use {', '.join(DEVICE_MAPS)}")
    if device != "auto":
        raise UsageError("--device-map spreads a model over all devices, and --device names one: give one of the two")


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` becomes float32 on the CPU and bfloat16 on CUDA."""
    return dtype if dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")


def read_config(reference: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model, without its weights. Raises `UsageError` where it cannot be read."""
    source = _source(reference, revision)
    with _one_line_errors(reference):
        return AutoConfig.from_pretrained(**source)


def find_architecture(registry: Registry, config: PreTrainedConfig, name: str) -> Architecture:
    """The family called `name`, or for `auto` the one that claims `config`. Raises `UsageError` where none does."""
    if name != "auto":
        architecture = registry.architecture(name)
        if not architecture.matches(config):
            raise UsageError(
                f"architecture {name!r} does not claim model type {config.model_type!r} "
                f"(it claims {', '.join(architecture.model_types)}): use --arch auto"
            )
        return architecture
    for architecture in registry.architectures.values():
        if architecture.matches(config):
            return architecture
    supported = "; ".join(f"{a.name}: {', '.join(a.model_types)}" for a in registry.architectures.values())
    raise UsageError(
        f"no architecture claims model type {config.model_type!r}. Supported: {supported}. A plugin can add one: "
        "implement spath_register_architectures (README, 'Write a plugin'); --sites tries the model without one"
    )


@dataclass(frozen=True)
class GuessedArchitecture(Architecture):
    """Stands in where no family is to say where the FFNs are: they are guessed from their down projections."""

    name: str = "unverified"
    model_types: tuple[str, ...] = ()
    ffns: tuple[FFN, ...] = ()
    pattern: str = ""
    """Dotted module path of the down projections; `*` stands for exactly one component."""

    def sites(self, model: PreTrainedModel) -> list[Site]:
        sites = guess_sites(model, self.pattern)
        counts = ", ".join(f"{count} {shape}" for shape, count in Counter(site.ffn.shape for site in sites).items())
        log.warning("%s: the FFNs (%s) are guessed from %r and unverified", type(model).__name__, counts, self.pattern)
        return sites


def load(request: LoadRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, placed and in evaluation mode, and its tokenizer. Raises `UsageError` for what cannot be loaded."""
    source = _source(request.reference, request.revision)
    config = read_config(request.reference, request.revision)
    auto_classes = request.architecture.auto_classes if request.architecture else {}
    auto_class = auto_classes.get(config.model_type, "AutoModelForCausalLM")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with _one_line_errors(request.reference, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where no file is found
        raise UsageError(f"{request.reference}: its tokenizer is missing, or has no vocabulary")
    placement: Any = request.device_map
    if placement is None and quantisation(config):
        placement = {"": request.device}  # packed weights cannot always be moved later
    if "gguf_file" in source:
        source["quantization_config"] = GgufConfig(dequantize=True)  # what stays packed has no compact execution
    else:
        source["use_safetensors"] = True
    with _one_line_errors(request.reference, "weights"):
        model, report = getattr(transformers, auto_class).from_pretrained(
            **source, dtype=DTYPES[request.dtype], output_loading_info=True, device_map=placement
        )
    if missing := sorted(report["missing_keys"]):
        raise UsageError(
            f"{request.reference}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them; "
            "a model with random weights would be measured"
        )
    if unused := sorted(report["unexpected_keys"]):
        log.warning(
            "%s: the model has no place for %d weights, %s among them", request.reference, len(unused), unused[0]
        )
    if placement is None:
        model = model.to(request.device)
    if device_map(model):
        _settle(request.reference, model)
    return model.eval().requires_grad_(False), tokenizer


def _settle(reference: str, model: PreTrainedModel) -> None:
    """Make the decoder of a model that accelerate has spread hand out its hidden states where its inputs came from."""
    if model.device.type == "meta":
        raise UsageError(f"{reference}: no device has room for its input embeddings beside the largest layer")
    weights = list(model.parameters())
    if offloaded := sum(weight.nbytes for weight in weights if weight.is_meta):
        log.warning(
            "%s: %.0f%% of its weights are offloaded to main memory or disk, and loaded anew for every forward",
            reference,
            100 * offloaded / sum(weight.nbytes for weight in weights),
        )
    hook = AlignDevicesHook(io_same_device=True, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(model.get_decoder(), hook, append=True)


def device_map(model: PreTrainedModel) -> dict[str, str] | None:
    """Where accelerate has put the parts of a model: module path to device, `cpu` or `disk`; none where not spread."""
    placed = getattr(model, "hf_device_map", None)
    return placed and {path: str(place) for path, place in placed.items()}


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and every weight as loaded: names, types, shapes and bytes.

    It does not depend on which devices the weights lie on.
    """
    configuration = model.config.to_json_string(use_diff=False)
    tensors = sorted([*model.named_parameters(), *model.named_buffers()])

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        path, _, own_name = name.rpartition(".")
        data = stored(model.get_submodule(path), own_name).detach().cpu().contiguous().flatten()
        about = f"{name}{tensor.dtype}{list(tensor.shape)}".encode()
        return hashlib.sha256(about + hashlib.sha256(data.view(torch.uint8).numpy().data).digest()).digest()

    with ThreadPoolExecutor(2) as pool:
        parts = b"".join(pool.map(digest, tensors))
    return hashlib.sha256(_without_paths(configuration).encode() + parts).hexdigest()


def parameter_count(model: PreTrainedModel) -> int:
    """Number of weights: tied ones once, and of packed matrices the numbers that these stand for."""
    total, packed = 0, []
    for path, module in model.named_modules():
        if is_packed(module):
            packed.append(f"{path}.")
            total += module.in_features * module.out_features
            total += module.bias.numel() if isinstance(getattr(module, "bias", None), torch.Tensor) else 0
    return total + sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(tuple(packed)) and name not in model.all_tied_weights_keys
    )


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all weights, tied ones once."""
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [type(tokenizer).__name__, bos_token_id(tokenizer), tokenizer.eos_token_id, tokenizer.all_special_tokens]
    return hashlib.sha256((json.dumps(special) + rules).encode()).hexdigest()


def output_head(model: PreTrainedModel, hidden: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Logits `[..., vocabulary]` in float32 of final hidden states `[..., hidden]`, soft-capped where the model is.

    They are on the device of `hidden`, whichever one the head is on. With a `logits_buffer`, those of states
    `[rows, hidden]` are written there: fresh memory for a large vocabulary costs a CPU much of the product's time.
    """
    head: Any = model.get_output_embeddings()
    if buffer is None:
        logits = head(hidden).to(hidden.device).float()
    else:
        logits = torch.mm(hidden, head.weight.t(), out=buffer[: len(hidden)])
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits_buffer(model: PreTrainedModel, rows: int) -> torch.Tensor | None:
    """Memory for the logits of so many rows, to be used again and again.

    There is none unless the output head is a matrix of float32 on the CPU and nothing else.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return None
    if head.weight.dtype != torch.float32 or head.weight.device.type != "cpu":
        return None
    return head.weight.new_empty(rows, len(head.weight))


def bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts in front of every text, where it does so."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def max_length(model: PreTrainedModel) -> int:
    """The longest input in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def rescaled_beyond(model: PreTrainedModel) -> int | None:
    """The tokens beyond which positions are embedded by the length of the longest input; none where they never are."""
    config = model.config.get_text_config(decoder=True)
    own = getattr(config, "rope_parameters", None) or {}
    return min(
        (
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
            for rope in [own, *(part for part in own.values() if isinstance(part, dict))]
            if "dynamic" in (kind := rope.get("rope_type") or "") or kind == "longrope"
        ),
        default=None,
    )


def _without_paths(configuration: str) -> str:
    return "\n".join(line for line in configuration.splitlines() if "_name_or_path" not in line)


def _source(reference: str, revision: str | None) -> dict[str, Any]:
    path = Path(reference).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise UsageError(f"{reference}: reading GGUF needs an extra: pip install 'spath-eval[gguf]'") from None
        _check_gguf(path)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{reference}: the folder holds no config.json, so it is no checkpoint")
        _check_weights(path)
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if path.exists():
        raise UsageError(f"{reference}: a model is a checkpoint folder, a .gguf file or a hub id")
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or path.suffix == ".gguf":
        raise UsageError(f"{reference}: no such file or folder")
    return {"pretrained_model_name_or_path": reference, "revision": revision}


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if pickles := [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]:
        raise UsageError(f"{folder}: {pickles[0]} is a pickle, which can execute code; convert it to safetensors")
    raise UsageError(f"{folder}: the folder holds no .safetensors file")


def _check_gguf(path: Path) -> None:
    import gguf

    size = path.stat().st_size
    try:
        tensors = gguf.GGUFReader(path).tensors
    except Exception as error:
        raise UsageError(f"{path}: not a readable GGUF file, or a truncated one ({_first_line(error)})") from error
    if any(tensor.data_offset + tensor.n_bytes > size for tensor in tensors):
        raise UsageError(f"{path}: the GGUF file is truncated")


class _one_line_errors:
    """Turns whatever transformers raises on a bad checkpoint into a `UsageError` of one line."""

    def __init__(self, reference: str, part: str = "configuration") -> None:
        self.reference, self.part = reference, part

    def __enter__(self) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if (
            isinstance(error, torch.OutOfMemoryError)
            or not isinstance(error, Exception)
            or isinstance(error, UsageError)
        ):
            return
        reason = _first_line(error)
        if "offload_folder" in reason:
            reason = "they do not fit into memory, and as they are stored in another form, they cannot stay on disk"
        raise UsageError(f"{self.reference}: its {self.part} cannot be loaded: {reason}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
