"""Loading: whatever is wrong with a model is one line, and a fingerprint is of the weights, not of the place."""

from __future__ import annotations

import json
import pickle
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spath_eval import LoadRequest, UsageError
from spath_eval.masks import drop_all, keep_all
from spath_eval.models import (
    bos_token_id,
    fingerprint,
    load,
    logits_buffer,
    max_length,
    output_head,
    parameter_count,
    read_config,
    resolve_device,
    resolve_dtype,
    weight_bytes,
)
from spath_eval.pathways import StaticPathway
from spath_eval.plugins.architectures.gemma import GEMMA


def request(reference, **others):
    settings = {"revision": None, "architecture": GEMMA, "device": "cpu", "dtype": "float32"} | others
    return LoadRequest(str(reference), **settings)


def read_and_load(reference):
    read_config(str(reference))
    return load(request(reference))


@pytest.fixture(scope="module")
def saved(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A good checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("gemma3_text").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def test_a_checkpoint_is_loaded_in_evaluation_mode(saved, tiny_model):
    model, tokenizer = load(request(saved))
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("w7 w9").input_ids == [2, 7, 9]
    expected = tiny_model("gemma3_text").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_dtype_and_family_may_be_left_to_the_request(saved):
    model, _ = load(request(saved, architecture=None, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert read_config(str(saved)).model_type == "gemma3_text"


def missing(folder):
    shutil.rmtree(folder)


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "gemma3_text",')


def unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')


def remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()")


class Executed:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Executed(folder / "executed")))


def pickled_beside_other_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Executed(folder / "executed")))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def truncated_in_its_header(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def without_some_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def without_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(load_file(next(folder.glob("*.safetensors"))), "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


DAMAGES = {
    missing: "no such file or folder",
    without_config: "holds no config.json",
    broken_config: "cannot be loaded",
    unknown_type: "no_such_model",
    remote_code: "cannot be loaded",
    pickled: "pytorch_model.bin is a pickle, which can execute code; convert it to safetensors",
    pickled_beside_other_safetensors: "its weights cannot be loaded",
    without_weights: "holds no .safetensors file",
    truncated: "its weights cannot be loaded",
    truncated_in_its_header: "its weights cannot be loaded",
    empty_weights: "its weights cannot be loaded",
    without_some_weights: "lacks 1 weights, model.layers.1.mlp.down_proj.weight among them",
    of_another_size: "its weights cannot be loaded",
    without_a_shard: "its weights cannot be loaded",
    without_tokenizer: "its tokenizer is missing",
    broken_tokenizer: "its tokenizer cannot be loaded",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_bad_checkpoint_is_a_usage_error_of_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UsageError) as caught:
        read_and_load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists(), "nothing of a checkpoint is executed"


def test_a_file_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "model.txt"
    file.write_text("a few words")
    with pytest.raises(UsageError, match=r"model\.txt: a model is a checkpoint folder, a \.gguf file or a hub id"):
        load(request(file))


@pytest.mark.parametrize("reference", ["./nowhere", "/no/such/folder", "~/no-such-folder", "a/b/c", "nowhere.gguf"])
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(reference):
    for reader in (read_config, lambda path: load(request(path))):
        with pytest.raises(UsageError, match=f"{reference}: no such file or folder"):
            reader(reference)


def test_a_hub_id_that_cannot_be_had_is_a_usage_error_of_one_line():
    with pytest.raises(UsageError, match="no-such-organisation/no-such-model") as caught:
        read_config("no-such-organisation/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A GGUF file with some weights, of which the test needs no more than that it is whole."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(1)
    generator = np.random.default_rng(0)
    for name in ("token_embd.weight", "blk.0.ffn_down.weight"):
        writer.add_tensor(name, generator.standard_normal((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("size", [0, 3, 4, 20, 100, 300, -1, -5000])
def test_a_truncated_gguf_is_a_usage_error_of_one_line(gguf_file, tmp_path, size):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes()[:size])
    for reader in (read_config, lambda path: load(request(path))):
        with pytest.raises(UsageError, match=r"model\.gguf.*truncated") as caught:
            reader(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"GGUF" + bytes(range(200)), b"words that are no model" * 50])
def test_what_is_no_gguf_is_a_usage_error_of_one_line(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.gguf: not a readable GGUF file") as caught:
        load(request(path))
    assert "\n" not in str(caught.value)


def test_a_gguf_that_lacks_what_a_model_needs_is_a_usage_error_of_one_line(gguf_file):
    with pytest.raises(UsageError, match=r"model\.gguf") as caught:
        load(request(gguf_file))
    assert "\n" not in str(caught.value)


def quantise(folder, about, packed):
    """Turn the checkpoint into one of quantised projections: `packed(name, weight)` gives the tensors of each."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors |= packed(name, weight) if name.endswith("_proj.weight") else {name: weight}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_ternary(folder):
    """Turn the checkpoint into one of the format that transformers itself can run packed on a CPU: four weights in a
    byte."""
    generator = torch.Generator().manual_seed(0)

    def packed(name, weight):
        size = (len(weight) // 4, weight.shape[1])
        numbers = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        return {name: numbers, f"{name}_scale": torch.tensor([8.0])}

    quantise(folder, {"quant_method": "bitnet"}, packed)
    return folder


@pytest.fixture
def eager():
    """Keeps what transformers would compile for minutes from being compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_quantised_model_is_loaded_packed_and_runs_masked_only(folder, saved, eager):
    plain, _ = load(request(saved))
    model, _ = load(request(make_ternary(folder)))
    sites = GEMMA.sites(model)
    assert model.get_submodule(sites[0].path).down_proj.weight.dtype == torch.uint8
    assert [(site.width, site.device.type) for site in sites] == [(64, "cpu")] * 3
    assert parameter_count(model) == parameter_count(plain) == sum(tensor.numel() for tensor in plain.parameters())
    assert weight_bytes(plain) == 4 * parameter_count(plain)
    projections = sum(tensor.numel() for name, tensor in plain.named_parameters() if name.endswith("_proj.weight"))
    scales = 4 * 7 * 3
    assert weight_bytes(model) == 4 * (parameter_count(plain) - projections) + projections / 4 + scales
    with pytest.raises(UsageError, match=r"is a BitLinear \(quantised by bitnet\), .*: --execution masked works"):
        sites[0].compact(drop_all(sites))
    tokens = torch.tensor([[2, 7, 9, 11]])
    with torch.inference_mode():
        dense = model(tokens).logits
        with StaticPathway(sites, keep_all(sites), "masked").applied():
            assert torch.equal(model(tokens).logits, dense)
        with StaticPathway(sites, drop_all(sites), "masked").applied():
            assert (model(tokens).logits - dense).abs().max() > 1e-2


def test_the_program_refuses_compact_for_quantised_weights_and_runs_them_masked(
    spath_eval_command, work_folder, tiny_checkpoint, brief, eager
):
    folder = make_ternary(shutil.copytree(tiny_checkpoint, work_folder / "ternary"))
    refused = spath_eval_command("run", "--model", folder, *brief)
    assert refused.status == 4
    assert (
        "is a BitLinear (quantised by bitnet), whose weights cannot be sliced: --execution masked works" in refused.err
    )
    assert "record:" not in refused.err
    outcome = spath_eval_command("run", "--model", folder, *brief, "--execution", "masked")
    assert outcome.status == 0
    model = outcome.record["models"][0]
    assert model["parameters"] == parameter_count(load(request(tiny_checkpoint))[0])
    assert model["quantisation"] == "bitnet"
    for case in outcome.record["cases"]:
        assert case["outcome"] == "passed"
        shares = case["sparsity"]
        assert shares["ffn_weights_removed"] == pytest.approx(shares["achieved"], abs=0.01)
        assert shares["model_weights_removed"] == pytest.approx(shares["ffn_weights_removed"] * model["ffn_share"])


def test_weights_that_transformers_dequantised_can_be_sliced(folder):
    """On a CPU it has no kernels for them."""

    def packed(name, weight):
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}

    quantise(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]}, packed)
    model, _ = load(request(folder))
    sites = GEMMA.sites(model)
    assert {site.unsliceable for site in sites} == {None}
    assert sites[0].compact(drop_all(sites)) is not sites[0].module


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is not missing here")
def test_a_quantised_model_whose_library_is_missing_is_a_usage_error_of_one_line(folder):
    quantise(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda name, weight: {name: weight})
    with pytest.raises(UsageError, match=f"{folder}: its weights cannot be loaded: .*bitsandbytes") as caught:
        load(request(folder))
    assert "\n" not in str(caught.value)


def test_automatic_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="'cuda:2' was asked for, but there are 2 CUDA devices"):
        resolve_device("cuda:2")
    assert (resolve_dtype("auto", "cpu"), resolve_dtype("auto", "cuda:1")) == ("float32", "bfloat16")
    assert resolve_dtype("float16", "cpu") == "float16"


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_that_is_not_there_is_a_usage_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"device '{device}' was asked for, but torch .* finds no CUDA device"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "mps", "xpu"])
def test_an_unknown_device_is_a_usage_error_that_lists_what_there_is(device):
    with pytest.raises(UsageError, match=f"unknown device '{device}': use cpu, cuda or cuda:N") as caught:
        resolve_device(device)
    assert "\n" not in str(caught.value)


def test_fingerprint_is_of_the_model_and_not_of_its_place(saved, folder):
    one, two, again = (load(request(path))[0] for path in (saved, folder, saved))
    assert fingerprint(one) == fingerprint(two) == fingerprint(again)


def test_fingerprint_changes_with_one_weight_and_with_the_configuration(saved):
    model, _ = load(request(saved))
    before = fingerprint(model)
    weight = model.model.layers[2].mlp.gate_proj.weight
    kept = weight[5, 3].item()
    weight[5, 3] = float(np.nextafter(np.float32(kept), np.float32(9)))
    assert fingerprint(model) != before
    weight[5, 3] = kept
    assert fingerprint(model) == before
    model.config.rms_norm_eps *= 2
    assert fingerprint(model) != before


def test_fingerprint_changes_with_the_dtype(saved):
    assert len({fingerprint(load(request(saved, dtype=dtype))[0]) for dtype in ("float32", "bfloat16", "float16")}) == 3


@pytest.mark.parametrize("model_type", GEMMA.model_types)
def test_output_head_gives_the_models_own_logits(tiny_model, model_type):
    capped = model_type in ("gemma2", "gemma3n_text")  # both have a soft cap, of 30 unless the configuration changes it
    model = tiny_model(model_type, **({"final_logit_softcapping": 3.0} if capped else {}))
    entered = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.inference_mode():
        own = model(torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))).logits
        assert torch.equal(output_head(model, entered[0]), own.float())
        hook.remove()
        rows, buffer = entered[0].flatten(0, 1), logits_buffer(model, 12)
        for part in (rows[:7], rows):
            found = output_head(model, part, buffer)
            assert torch.equal(found, own.float().flatten(0, 1)[: len(part)])
            assert capped or found.data_ptr() == buffer.data_ptr()
    assert (own.abs().max() <= 3) == capped


@pytest.mark.parametrize("change", ["bias", "hook", "dtype", "forward"])
def test_an_output_head_that_is_more_than_a_product_is_called(tiny_model, change):
    model = tiny_model("llama")
    head, hidden = model.get_output_embeddings(), torch.randn(3, model.config.hidden_size)
    if change == "bias":
        head.bias = torch.nn.Parameter(torch.ones(head.out_features))
    elif change == "hook":
        head.register_forward_hook(lambda _, inputs, output: output + 1)
    elif change == "dtype":
        model, hidden = model.bfloat16(), hidden.bfloat16()
    else:
        head.forward = lambda hidden: hidden @ head.weight.T + 1
    with torch.inference_mode():
        assert torch.equal(output_head(model, hidden, logits_buffer(model, 3)), head(hidden).float())


def test_bos_is_what_the_tokenizer_puts_in_front(tiny_tokenizer):
    from transformers import PreTrainedTokenizerFast

    assert bos_token_id(tiny_tokenizer) == 2
    plain = PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer(), bos_token="<bos>", unk_token="<unk>")
    assert plain.bos_token_id == 1
    assert bos_token_id(plain) is None


def bare_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_max_length_is_the_configurations(tiny_model):
    assert max_length(tiny_model("gemma", max_position_embeddings=96)) == 96
