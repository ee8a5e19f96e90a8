"""Loading: whatever is wrong with a model is one line, and a fingerprint is of the weights, not of the place."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spath_eval import LoadRequest, UsageError
from spath_eval.models import (
    bos_token_id,
    fingerprint,
    load,
    max_length,
    output_head,
    read_config,
    resolve_device,
    resolve_dtype,
)
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
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.inference_mode():
        own = model(torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))).logits
        assert torch.equal(output_head(model, entered[0]), own.float())
    assert (own.abs().max() <= 3) == capped


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
