"""Texts: what a document is, who is held out, and which tokens count."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch

from spath_eval import UsageError
from spath_eval.texts import HUB_DOCUMENTS, batches, blocks, digest, in_hash_order, read_corpus


def paragraphs(count, *, seed=0, length=12):
    generator = random.Random(seed)
    return [" ".join(f"w{generator.randrange(4, 100)}" for _ in range(length)) for _ in range(count)]


def counted_ids(made):
    """The counted tokens of each document in order."""
    found = {}
    for batch in made:
        for row, document in enumerate(batch.documents):
            found.setdefault(document, []).append(batch.input_ids[row][batch.counted[row]].tolist())
    return found


def test_blank_lines_part_documents():
    assert blocks("one\ntwo\n\n  \t\n\nthree\n  four\n\n") == ["one\ntwo", "three\n  four"]
    assert blocks("\n\n \n") == blocks("") == []


def test_windows_line_ends_part_documents_too():
    assert blocks("one\r\ntwo\r\n\r\nthree\r\n") == ["one\ntwo", "three"]


def test_a_long_block_is_cut_at_the_line_end_beyond_4000_characters():
    lines = ["x" * 99] * 100
    documents = blocks("\n".join(lines))
    assert [len(document.splitlines()) for document in documents] == [41, 41, 18]
    assert "\n".join(documents) == "\n".join(lines)


def test_a_line_is_never_cut():
    assert blocks("x" * 9000 + "\nshort") == ["x" * 9000, "short"]


def test_a_folder_means_its_texts_but_no_licences(tmp_path):
    contents = {
        "a.txt": "text file",
        "deep/b.md": "markdown file",
        "deep/er/c.tex": "tex file",
        "d.py": "python file",
        "LICENSE": "licence without suffix",
        "LICENSE.txt": "licence as text",
        "deep/MY-LICENSE.md": "licence elsewhere",
        "data.json": "data",
        "notes.rst": "other markup",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = read_corpus(tmp_path)
    assert sorted(corpus.profile + corpus.heldout) == ["markdown file", "python file", "tex file", "text file"]
    assert corpus.source == str(tmp_path)


def test_a_file_is_read_whatever_its_suffix(tmp_path):
    file = tmp_path / "corpus.dat"
    file.write_text("\n\n".join(paragraphs(50)))
    corpus = read_corpus(file)
    assert sorted(corpus.profile + corpus.heldout) == sorted(paragraphs(50))


def test_one_document_in_five_is_held_out_by_its_hash(tmp_path):
    documents = paragraphs(1000)
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    corpus = read_corpus(tmp_path / "all.txt")
    assert len(corpus.profile) + len(corpus.heldout) == 1000
    assert not set(corpus.profile) & set(corpus.heldout)
    assert len(corpus.heldout) == pytest.approx(200, abs=50)
    assert all(int(digest(document), 16) % 5 == 0 for document in corpus.heldout)
    assert list(corpus.profile) == sorted(corpus.profile, key=digest)


def test_split_and_order_do_not_depend_on_names_or_places(tmp_path):
    documents = paragraphs(100)
    for folder, names in (("one", ["a", "b"]), ("two", ["z", "c"])):
        (tmp_path / folder).mkdir()
        shuffled = random.Random(folder).sample(documents, 100)
        for name, part in zip(names, (shuffled[:30], shuffled[30:]), strict=True):
            (tmp_path / folder / f"{name}.txt").write_text("\n\n".join(part))
    one, two = read_corpus(tmp_path / "one"), read_corpus(tmp_path / "two")
    assert (one.profile, one.heldout) == (two.profile, two.heldout)


def test_duplicates_count_once_whatever_their_white_space(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs(20)))
    (tmp_path / "b.txt").write_text("\n\n".join(text.replace(" ", "  ") for text in paragraphs(30)))
    corpus = read_corpus(tmp_path)
    assert len(corpus.profile) + len(corpus.heldout) == 30
    assert len(in_hash_order(["a b", "a  b", "a\nb", " ", "", "c"])) == 2


@pytest.mark.parametrize("text", ["", " \n\t\n\n  "])
@pytest.mark.parametrize("folder", [False, True])
def test_text_without_a_document_is_a_usage_error(tmp_path, text, folder):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UsageError, match="holds no text"):
        read_corpus(tmp_path if folder else tmp_path / "a.txt")


def test_an_empty_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"holds no text \(read: \.md, \.py, \.tex, \.txt\)"):
        read_corpus(tmp_path)


def test_documents_that_are_all_held_out_are_a_usage_error(tmp_path):
    only = next(text for text in paragraphs(100) if int(digest(text), 16) % 5 == 0)
    (tmp_path / "a.txt").write_text(only)
    with pytest.raises(UsageError, match="1 documents leave none to profile"):
        read_corpus(tmp_path)


def test_a_missing_path_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"no-such\.txt: no such file or folder"):
        read_corpus(tmp_path / "no-such.txt")


def test_bytes_that_are_no_utf8_are_a_usage_error_that_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UsageError, match=r"b\.txt.*utf-8"):
        read_corpus(tmp_path)


def dataset(folder, **splits):
    """A folder that `datasets` reads as a dataset: a file of rows for each split."""
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    return datasets


@pytest.fixture
def local_dataset(datasets, tmp_path):
    rows = [{"text": text, "label": number} for number, text in enumerate(paragraphs(60))]
    return dataset(tmp_path / "local", train=[*rows, {"text": None, "label": 60}, {"text": " ", "label": 61}], test=[])


def test_the_field_of_a_dataset_is_split_as_a_file_is(local_dataset, tmp_path):
    (tmp_path / "all.txt").write_text("\n\n".join(paragraphs(60)))
    found, expected = read_corpus(f"hub:{local_dataset}:train:text"), read_corpus(tmp_path / "all.txt")
    assert (found.profile, found.heldout) == (expected.profile, expected.heldout)
    assert found.source == f"hub:{local_dataset}:train:text"


def test_a_row_of_a_dataset_is_cut_as_a_file_is(datasets, tmp_path):
    long = "\n".join(["x" * 99] * 100)
    folder = dataset(tmp_path / "rows", train=[{"text": "one\ntwo\n\nthree"}, {"text": long}])
    corpus = read_corpus(f"hub:{folder}:train:text")
    assert {*corpus.profile, *corpus.heldout} == {"one\ntwo", "three", *blocks(long)}


@pytest.mark.parametrize(
    ("split", "field", "words"),
    [
        ("validation", "text", "Bad split: validation. Available splits: ['train'"),
        ("train", "question", "its rows have no field 'question': they have text, label"),
        ("train", "label", "its field 'label' holds no text but int"),
    ],
)
def test_what_a_dataset_does_not_have_is_a_usage_error_of_one_line(local_dataset, split, field, words):
    with pytest.raises(UsageError) as caught:
        read_corpus(f"hub:{local_dataset}:{split}:{field}")
    assert str(caught.value).startswith(f"profile text hub:{local_dataset}:{split}:{field}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["hub:", "hub:name", "hub:name:train", "hub:name:train:", "hub::train:text", "hub:a:b:c:d"]
)
def test_a_dataset_is_named_with_split_and_field(spec):
    with pytest.raises(UsageError, match=f"profile text '{spec}': expected hub:DATASET:SPLIT:FIELD or hub:DATASET,CON"):
        read_corpus(spec)


def test_without_a_network_a_dataset_is_a_usage_error_of_one_line(datasets):
    with pytest.raises(UsageError, match=r"^profile text hub:nobody/nothing:train:text: Couldn't reach [^\n]*$"):
        read_corpus("hub:nobody/nothing:train:text")


@pytest.fixture
def hub(datasets, monkeypatch):
    """A stand-in for the hub: `hub.asked` is what was asked for, `hub.served` how many rows were read of very many."""
    hub = SimpleNamespace(asked=[], served=0, base_path="hf://datasets/some/one@" + 10 * "0a1b")

    def rows():
        for number in range(10**9):
            hub.served += 1
            yield {"question": f"What is {number}?", "image": None}

    def builder(path, name=None):
        hub.asked.append((path, name))

        def stream(split):
            hub.asked.append(split)
            return datasets.IterableDataset.from_generator(rows)

        return SimpleNamespace(as_streaming_dataset=stream, base_path=hub.base_path)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return hub


def test_of_a_dataset_no_more_is_read_than_20000_documents(hub):
    corpus = read_corpus("hub:some/one,main:train:question")
    assert hub.asked == [("some/one", "main"), "train"]
    assert len(corpus.profile) + len(corpus.heldout) == HUB_DOCUMENTS == 20_000
    assert hub.served <= HUB_DOCUMENTS + 2
    assert {"What is 0?", "What is 19999?"} <= {*corpus.profile, *corpus.heldout}


@pytest.mark.parametrize(
    ("base_path", "revision"),
    [("hf://datasets/some/one@" + 10 * "0a1b", f" at revision {10 * '0a1b'}"), ("", ""), (None, "")],
)
def test_the_source_says_the_revision_and_how_much_was_read(hub, base_path, revision):
    hub.base_path = base_path
    source = read_corpus("hub:some/one:train:question").source
    assert source == f"hub:some/one:train:question{revision}, the first 20000 documents"
    assert hub.asked == [("some/one", None), "train"]


def test_a_run_profiles_a_dataset(run, local_dataset):
    outcome = run("--profile-text", f"math=hub:{local_dataset}:train:text")
    assert outcome.status == 0, outcome.err
    assert outcome.record["profiles"][0]["texts"] == {"math": f"hub:{local_dataset}:train:text"}
    assert outcome.record["command"]["resolved"]["profile_text"] == {"math": f"hub:{local_dataset}:train:text"}


def test_a_run_refuses_what_names_no_dataset(run):
    outcome = run("--profile-text", "math=hub:name:train")
    assert outcome.status == 4
    assert outcome.err.count("\n") == 1
    assert "expected hub:DATASET:SPLIT:FIELD" in outcome.err


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("budget", [1, 100, 257])
def test_counted_tokens_equal_the_budget_exactly(tiny_tokenizer, batch_size, budget):
    made = list(batches(tiny_tokenizer, paragraphs(40), tokens=budget, batch_size=batch_size))
    assert sum(int(batch.counted.sum()) for batch in made) == budget
    assert all(len(batch.input_ids) <= batch_size for batch in made)
    ids = [int(word[1:]) for text in paragraphs(40) for word in text.split()]
    assert [one for _, rows in sorted(counted_ids(made).items()) for row in rows for one in row] == ids[:budget]


def test_text_that_ends_before_the_budget_is_used_whole(tiny_tokenizer):
    made = list(batches(tiny_tokenizer, paragraphs(3), tokens=10_000, batch_size=2))
    assert sum(int(batch.counted.sum()) for batch in made) == 36


def test_bos_and_padding_do_not_count(tiny_tokenizer):
    documents = ["w4 w5 w6 w7 w8", "w9", "w10 w11 w12"]
    (batch,) = batches(tiny_tokenizer, documents, tokens=100, batch_size=3)
    assert batch.documents == (1, 2, 0), "rows by length, so that little is padded"
    assert batch.input_ids.tolist() == [[2, 9, 0, 0, 0, 0], [2, 10, 11, 12, 0, 0], [2, 4, 5, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.counted.sum(-1).tolist() == [1, 3, 5]
    assert not batch.counted[:, 0].any()
    assert not batch.counted[batch.attention_mask == 0].any()
    assert batch.inputs(torch.device("cpu")).keys() == {"input_ids", "attention_mask"}


def test_an_over_long_document_continues_in_rows_that_each_have_bos(tiny_tokenizer):
    (text,) = paragraphs(1, length=25)
    made = list(batches(tiny_tokenizer, ["w5", text], tokens=1000, batch_size=2, window=10))
    rows = counted_ids(made)[1]
    assert sorted(map(len, rows)) == [7, 9, 9]
    assert sorted(one for row in rows for one in row) == sorted(int(word[1:]) for word in text.split())
    assert all((batch.input_ids[:, 0] == 2).all() for batch in made)
    assert all(batch.input_ids.shape[1] <= 10 for batch in made)


def test_without_bos_every_token_counts(tiny_tokenizer):
    from tokenizers import processors

    plain = copy.deepcopy(tiny_tokenizer)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    (batch,) = batches(plain, ["w4 w5", "w6"], tokens=100, batch_size=2)
    assert batch.input_ids.tolist() == [[6, 0], [4, 5]]
    assert batch.counted.tolist() == [[True, False], [True, True]]


def test_documents_without_a_token_make_no_row(tiny_tokenizer):
    assert list(batches(tiny_tokenizer, ["", "  "], tokens=100, batch_size=2)) == []
    assert list(batches(tiny_tokenizer, [], tokens=100, batch_size=2)) == []


def test_many_rows_are_batched_as_they_come(tiny_tokenizer):
    """Sorting by length looks at a few batches at a time, and loses nothing between them."""
    documents = [text[: 4 * (number % 7 + 1)] for number, text in enumerate(paragraphs(100))]
    made = batches(tiny_tokenizer, documents, tokens=100_000, batch_size=2)
    first = next(made)
    assert max(first.documents) < 32
    seen = sorted(number for batch in [first, *made] for number in batch.documents)
    assert seen == list(range(100))


@pytest.fixture(scope="module")
def real_tokenizer():
    from transformers import AutoTokenizer

    from spath_eval.plugins.architectures.gemma import GEMMA

    return AutoTokenizer.from_pretrained(GEMMA.checkpoint.parent / "tokenizer")


@pytest.mark.parametrize("budget", [1, 3])
def test_the_real_tokenizer_counts_no_bos_either(real_tokenizer, budget):
    (batch,) = batches(real_tokenizer, ["What is 12 + 5?"], tokens=budget, batch_size=1)
    assert batch.input_ids[0, 0] == real_tokenizer.bos_token_id
    assert batch.counted.sum() == budget


@pytest.mark.parametrize("special", ["<bos>", "<eos>", "<pad>"])
def test_a_special_token_spelt_out_in_the_text_is_text(real_tokenizer, special):
    (batch,) = batches(real_tokenizer, [f"12 {special} 5"], tokens=100, batch_size=1)
    assert not set(real_tokenizer.all_special_ids) & set(batch.input_ids[0, 1:].tolist())
    assert batch.counted.sum() == batch.input_ids.shape[1] - 1 > 5
    assert real_tokenizer(special, add_special_tokens=False).input_ids == [
        real_tokenizer.convert_tokens_to_ids(special)
    ], "the tokenizer is left as it was"
