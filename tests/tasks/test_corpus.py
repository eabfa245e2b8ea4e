"""Sources of text, token caches, tokenizers and the shuffle."""

from __future__ import annotations

import os

import numpy as np
import pytest

from seqmodels.tasks import token_cache
from seqmodels.tasks.corpus import CorpusError, Document, open_corpus
from seqmodels.tasks.shuffle import hashed_order, permutation, raw_draws
from seqmodels.tasks.token_cache import build_token_cache, load_token_cache, open_token_cache
from seqmodels.tasks.tokenizer import ByteTokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    for name, text in {
        "b.py": "two",
        "a.py": "one",
        "sub/c.py": "three",
        "n.md": "four",
        "e.py": "",
        ".git/x.py": "no",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_folder_is_read_in_the_order_of_its_paths(folder):
    assert list(open_corpus(str(folder))) == [
        Document("a.py", b"one"), Document("b.py", b"two"), Document("n.md", b"four"), Document("sub/c.py", b"three")
    ]  # fmt: skip
    assert [name for name, _ in open_corpus(str(folder), suffixes=(".py",))] == ["a.py", "b.py", "sub/c.py"]


def test_a_file_is_one_document(folder):
    assert list(open_corpus(str(folder / "n.md"))) == [Document("n.md", b"four")]


def test_the_standard_library_is_there_without_tests_and_packages():
    names = [name for name, _ in open_corpus("stdlib")]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "site-packages", "idlelib"} & set(name.split("/"))]


@pytest.mark.parametrize(
    ("source", "message"),
    [("{}/absent", "does not exist"), ("{}/e.py", "holds no text"), ("{}/empty", "holds no text")],
)
def test_nothing_to_read_is_refused(folder, source, message):
    (folder / "empty").mkdir()
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(source.format(folder)))


def test_suffixes_that_match_nothing_are_named(folder):
    with pytest.raises(CorpusError, match=r"files that end with \.txt"):
        list(open_corpus(str(folder), suffixes=(".txt",)))


def test_a_hugging_face_data_set_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "", "drei ä"], "other": [1, 2, 3]}).save_to_disk(str(tmp_path / "set"))
    found = list(open_corpus(f"hf:{tmp_path / 'set'}"))
    assert found == [Document("train/0", b"one"), Document("train/2", "drei ä".encode())]
    with pytest.raises(CorpusError, match=r"no column 'content'; set data.text_column to one of text, other"):
        list(open_corpus(f"hf:{tmp_path / 'set'}", text_column="content"))


def test_a_cache_gives_documents_back(folder, tmp_path):
    cache = build_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache")
    assert cache.names == ["a.py", "b.py", "n.md", "sub/c.py"]
    assert [bytes(cache.document(index)) for index in range(4)] == [b"\0one\0", b"\0two\0", b"\0four\0", b"\0three\0"]
    assert cache.tokens.dtype == np.uint8
    assert cache.text_bytes.tolist() == [3, 3, 4, 5]
    again = load_token_cache(tmp_path / "cache" / cache.digest)
    assert again.names == cache.names
    assert np.array_equal(again.tokens, cache.tokens)


def test_the_digest_follows_names_and_contents(folder, tmp_path):
    def digest():
        return build_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache").digest

    first = digest()
    assert digest() == first
    (folder / "a.py").write_text("oNe")
    second = digest()
    (folder / "a.py").rename(folder / "aa.py")
    assert len({first, second, digest()}) == 3


def test_a_known_corpus_is_not_read_again(folder, tmp_path, monkeypatch):
    first = open_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "build_token_cache", lambda *arguments: pytest.fail("read again"))
        again = open_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache")
    assert again.digest == first.digest
    (folder / "a.py").write_text("other text")
    changed = open_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache")
    assert bytes(changed.document(0)) == b"\0other text\0"


def test_a_failed_write_leaves_no_cache(folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        build_token_cache(open_corpus(str(folder)), ByteTokenizer(), tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_hugging_face_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<s>": 0, "state": 1, "space": 2, "model": 3, "?": 4, ",": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tidy = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", clean_up_tokenization_spaces=True
    )
    tidy.save_pretrained(tmp_path / "with")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path / "without")
    tokenizer = load_tokenizer(str(tmp_path / "with"))
    assert (tokenizer.vocab_size, tokenizer.separator) == (6, 0)
    cache = build_token_cache([Document("d", b"state space model space")], tokenizer, tmp_path / "cache")
    assert cache.document(0).tolist() == [0, 1, 2, 3, 2, 0]
    assert tokenizer.decode([1, 5, 2]) == "state , space"  # as it was read, not tidied
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        load_tokenizer(str(tmp_path / "without"))


def test_large_vocabularies_take_wider_tokens(tmp_path):
    class Wide(ByteTokenizer):
        name = "wide"
        vocab_size = 70_000

        def encode(self, content):
            return np.frombuffer(content, dtype=np.uint8).astype(np.uint32) + 66_000

    cache = build_token_cache([Document("d", b"ab")], Wide(), tmp_path)
    assert cache.tokens.dtype == np.uint32
    assert cache.document(0).tolist() == [0, 66_097, 66_098, 0]


def test_draws_are_those_of_pcg64():
    """The published stream of PCG64 (XSL-RR 128/64), computed here from its definition."""
    state = np.random.PCG64(np.random.SeedSequence([5, 1])).state["state"]
    value, increment, mask = state["state"], state["inc"], (1 << 128) - 1
    expected = []
    for _ in range(20):
        value = (value * 47026247687942121848144207491837523525 + increment) & mask
        mixed, turn = ((value >> 64) ^ value) & ((1 << 64) - 1), value >> 122
        expected.append(((mixed >> turn) | (mixed << (-turn & 63))) & ((1 << 64) - 1))
    assert raw_draws(5, 1, count=20).tolist() == expected


def test_permutations_never_change():
    """Fixed values: a run begun with one version of numpy goes on with another."""
    assert permutation(0, 0, count=10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert sorted(permutation(1, 2, count=1000).tolist()) == list(range(1000))


def test_a_hashed_order_does_not_move_names_when_others_come():
    names = [f"file{index}" for index in range(30)]
    order = [names[index] for index in hashed_order(names, 3)]
    fewer = names[::2]
    assert [fewer[index] for index in hashed_order(fewer, 3)] == [name for name in order if name in fewer]
    assert order != [names[index] for index in hashed_order(names, 4)]
