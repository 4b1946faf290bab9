import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.train import corpus as corpus_module
from shardpar.train import tokenizer as tokenizer_module
from shardpar.train.corpus import Corpus, read_corpus
from shardpar.train.options import DataOptions
from shardpar.train.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    ByteTokenizer,
    digest,
    encode_corpus,
    from_text,
    make_tokenizer,
    train_bpe,
)

anything = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def topics():
    return read_corpus(DataOptions())


@pytest.fixture(scope="module")
def bpe(topics):
    return train_bpe(topics, 600)


def both(bpe):
    return [ByteTokenizer(), bpe, from_text(bpe.to_text()), from_text(ByteTokenizer().to_text())]


@settings(deadline=None)
@given(text=anything)
def test_decoding_gives_back_every_text(bpe, text):
    for tokenizer in both(bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size


@settings(deadline=None)
@given(ids=st.lists(st.integers(-3, 700), max_size=20))
def test_decoding_never_fails(bpe, ids):
    for tokenizer in both(bpe):
        assert isinstance(tokenizer.decode(ids), str)
        assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(ids)


def test_half_characters_and_unknown_ids_are_replaced(bpe):
    assert ByteTokenizer().decode([97, 0xC3, 256, -1, 98]) == "a\ufffd\ufffd\ufffdb"
    a = bpe.encode("a").tolist()
    assert bpe.decode([*a, 10_000, *a]) == "a\ufffda"
    assert bpe.decode(bpe.encode("\U0001f600")[:-1]) == "\ufffd"


def test_bytes_are_bytes():
    assert ByteTokenizer().vocab_size == 256
    assert bytes(ByteTokenizer().encode("aé\n")) == "aé\n".encode()


def test_bpe_has_the_vocabulary_asked_for_and_shortens_text(bpe, topics):
    assert bpe.vocab_size == 600
    assert bpe.separator == (0,)
    text = topics.text[:20_000]
    assert bpe.encode(text).size < 0.6 * len(text)


def test_data_cannot_forge_the_separator(bpe):
    for tokenizer in (bpe, from_text(bpe.to_text())):
        ids = tokenizer.encode(f"a{END_OF_TEXT}b")
        assert not set(tokenizer.separator) & set(ids.tolist())
        assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
        assert tokenizer.decode([*tokenizer.separator]) == END_OF_TEXT


def test_a_short_text_gives_the_vocabulary_it_can():
    small = train_bpe(Corpus.of(["ab"]), 8192)
    assert small.vocab_size == 258
    assert train_bpe(Corpus.of([]), 257).vocab_size == 257
    assert small.decode(small.encode("grüße")) == "grüße"


TRAIN = """
from shardpar.train.corpus import read_corpus
from shardpar.train.options import DataOptions
from shardpar.train.tokenizer import digest, make_tokenizer
options = DataOptions(tokenizer="bpe", vocab_size=600)
print(digest(make_tokenizer(options, read_corpus(options))))
"""


def test_training_is_the_same_in_every_process(bpe):
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == digest(bpe)


def test_the_text_form_is_stable_and_complete(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        again = from_text(tokenizer.to_text())
        assert again.to_text() == tokenizer.to_text()
        assert again.name == tokenizer.name
        assert again.vocab_size == tokenizer.vocab_size
    assert digest(bpe) != digest(ByteTokenizer())
    assert digest(bpe) != digest(train_bpe(Corpus.of(["other text, other text"]), 600))


@settings(deadline=None)
@given(documents=st.lists(anything, max_size=5))
def test_a_corpus_is_its_documents_with_separators_between(bpe, documents):
    kept = [document for document in documents if document]
    for tokenizer, separator in ((ByteTokenizer(), "\n\n"), (bpe, END_OF_TEXT)):
        ids = encode_corpus(tokenizer, Corpus.of(documents))
        assert tokenizer.decode(ids) == separator.join(kept)
        parts = [tokenizer.encode(document).tolist() for document in kept]
        expected = []
        for part in parts:
            expected += part + list(tokenizer.separator)
        assert ids.tolist() == expected[: len(expected) - len(tokenizer.separator)]


def test_cutting_long_documents_between_words_changes_no_token(bpe, topics, monkeypatch):
    text = topics.text[:100_000] + "\n\n \n x  y \u3000z\n\u3000w it's  \n" * 50
    whole = bpe.encode(text)
    pieces = Corpus.pieces
    monkeypatch.setattr(corpus_module.Corpus, "pieces", lambda self: pieces(self, 500))
    monkeypatch.setattr(tokenizer_module, "_GROUP_CHARACTERS", 2000)
    assert np.array_equal(encode_corpus(bpe, Corpus.of([text])), whole)


def test_encoding_text_that_is_no_unicode_is_refused(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(DataError, match=r"\\udcff stands alone"):
            tokenizer.encode("caf\udcff")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": "shardpar-tokenizer/9"}', '{"model": {}}', "[" * 100_000],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(text):
    with pytest.raises(DataError, match=r"^runs/a/tokenizer\.json: it is not") as caught:
        from_text(text, "runs/a/tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_separator_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(DataError, match=r"lacks <\|endoftext\|>"):
        from_text(Tokenizer(models.BPE()).to_str())


def test_without_the_library_the_message_says_what_to_install(bpe, monkeypatch):
    saved = bpe.to_text()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for attempt in (
        lambda: make_tokenizer(DataOptions(tokenizer="bpe"), Corpus.of(["a"])),
        lambda: from_text(saved),
    ):
        with pytest.raises(DataError, match=r"pip install 'shardpar\[tokenizers\]'"):
            attempt()
    assert isinstance(bpe, BpeTokenizer)
