"""Decides how text becomes numbers and back: bytes as they are, or a byte-level BPE.

Both know every string, so nothing is ever "unknown", and decoding what was encoded gives
the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from shardpar.errors import DataError
from shardpar.train.corpus import Corpus
from shardpar.train.options import DataOptions

END_OF_TEXT = "<|endoftext|>"

_BYTE_FORMAT = "shardpar-tokenizer/1"
_GROUP_CHARACTERS = 1 << 20


class Tokenizer(Protocol):
    """What training and generation need to know of a tokenizer."""

    @property
    def name(self) -> str:
        """The value of `data.tokenizer` that makes such a one."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    @property
    def separator(self) -> tuple[int, ...]:
        """The ids that stand between two documents."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, in the smallest unsigned dtype that holds `vocab_size` of them."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on as many threads as the tokenizer can use."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids; what is not text (half a character, an unknown id) becomes U+FFFD."""
        ...

    def to_text(self) -> str:
        """All of it as JSON text, for `from_text`."""
        ...


class ByteTokenizer:
    r"""Each byte of the UTF-8 text is a token.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é!")
    array([195, 169,  33], dtype=uint8)
    >>> tokenizer.decode([195, 169, 33, 195, 999])
    'é!\ufffd\ufffd'
    """

    name = "byte"
    vocab_size = 256
    separator = (ord("\n"), ord("\n"))

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(_utf8(text), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        # 0xff is in no UTF-8 text, so an id that is no byte is replaced as such a byte is.
        return bytes(i if 0 <= i < 256 else 0xFF for i in _integers(ids)).decode(errors="replace")

    def to_text(self) -> str:
        """See `Tokenizer`."""
        return json.dumps({"format": _BYTE_FORMAT, "kind": self.name}) + "\n"


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` library, kept in that library's own JSON.

    Args:
      model: a `tokenizers.Tokenizer` whose vocabulary has `<|endoftext|>`.
    """

    name = "bpe"

    def __init__(self, model: Any) -> None:
        # Data that spells out the separator must not be able to forge one.
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size: int = model.get_vocab_size()
        self.separator: tuple[int, ...] = (model.token_to_id(END_OF_TEXT),)
        self._dtype = np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        for text in texts:
            _utf8(text)
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        runs: list[list[int]] = [[]]
        for i in _integers(ids):
            if 0 <= i < self.vocab_size:
                runs[-1].append(i)
            else:
                runs.append([])
        return "\ufffd".join(self._model.decode(run, skip_special_tokens=False) for run in runs)

    def to_text(self) -> str:
        """See `Tokenizer`."""
        return self._model.to_str(pretty=False) + "\n"


def make_tokenizer(options: DataOptions, training: Corpus) -> Tokenizer:
    """The tokenizer that `options` name, trained where it needs to be.

    Args:
      options: section `data` of a config.
      training: the training part of the corpus; the same text gives the same tokenizer.

    Raises:
      DataError: the library for it is not installed.

    >>> make_tokenizer(DataOptions(), Corpus.of(["any"])).name
    'byte'
    """
    if options.tokenizer == "byte":
        return ByteTokenizer()
    return train_bpe(training, options.vocab_size)


def train_bpe(training: Corpus, vocab_size: int) -> BpeTokenizer:
    """Learns byte pairs from a corpus.

    Args:
      training: the text to learn from.
      vocab_size: the most ids there may be: `<|endoftext|>`, 256 bytes, and merges. A short
        text may not have as many pairs worth merging; `vocab_size` of the result says.

    Raises:
      DataError: the library is not installed.
    """
    library = _tokenizers_library()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((piece for piece, _ in training.pieces()), trainer)
    return BpeTokenizer(model)


def from_text(text: str, where: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer that `to_text` wrote.

    Args:
      text: what `to_text` gave, or a `tokenizer.json` of the `tokenizers` library whose
        vocabulary has `<|endoftext|>`.
      where: the file's name, for messages.

    Raises:
      DataError: the text is no such tokenizer, or its library is not installed.

    >>> from_text(ByteTokenizer().to_text()).name
    'byte'
    """
    refusal = f"{where}: it is not a tokenizer that shardpar saved"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{refusal} (no JSON: {error}); restore the file") from error
    if isinstance(content, dict) and "format" in content:
        if content["format"] == _BYTE_FORMAT and content.get("kind") == ByteTokenizer.name:
            return ByteTokenizer()
        raise DataError(
            f"{refusal}: its format is {content['format']!r}, {_BYTE_FORMAT!r} was expected; "
            "use the shardpar version that wrote it"
        )
    library = _tokenizers_library()
    try:
        model = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for every fault
        raise DataError(f"{refusal} ({error}); restore the file") from error
    if model.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"{refusal}: its vocabulary lacks {END_OF_TEXT}; restore the file")
    return BpeTokenizer(model)


def encode_corpus(tokenizer: Tokenizer, corpus: Corpus) -> np.ndarray:
    r"""The ids of all documents in order, with the tokenizer's separator between them.

    >>> bytes(encode_corpus(ByteTokenizer(), Corpus.of(["ab", "c"])))
    b'ab\n\nc'
    """
    ids, _ = encode_documents(tokenizer, corpus)
    return ids[: max(0, ids.size - len(tokenizer.separator))]


def encode_documents(tokenizer: Tokenizer, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    r"""The ids of all documents in order, each with the tokenizer's separator at its end.

    Returns:
      The ids, and int64 where each document ends in them.

    >>> ids, ends = encode_documents(ByteTokenizer(), Corpus.of(["ab", "c"]))
    >>> bytes(ids), ends.tolist()
    (b'ab\n\nc\n\n', [4, 7])
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = np.array(tokenizer.separator, dtype)
    done: list[np.ndarray] = [np.zeros(0, dtype)]
    ends: list[int] = []
    group: list[tuple[str, bool]] = []
    size = 0

    def finish_group() -> None:
        nonlocal size
        arrays: list[np.ndarray] = []
        for ids, (_, last) in zip(
            tokenizer.encode_batch([piece for piece, _ in group]), group, strict=True
        ):
            arrays.append(ids)
            size += ids.size
            if last:
                arrays.append(separator)
                size += separator.size
                ends.append(size)
        done.append(np.concatenate(arrays))
        group.clear()

    waiting = 0
    for piece, last in corpus.pieces():
        group.append((piece, last))
        waiting += len(piece)
        if waiting >= _GROUP_CHARACTERS:
            finish_group()
            waiting = 0
    if group:
        finish_group()
    return np.concatenate(done), np.array(ends, np.int64)


def digest(tokenizer: Tokenizer) -> str:
    """A short name that two tokenizers share only if they are the same.

    >>> digest(ByteTokenizer()) == digest(from_text(ByteTokenizer().to_text()))
    True
    """
    return hashlib.blake2b(tokenizer.to_text().encode(), digest_size=8).hexdigest()


def _tokenizers_library() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise DataError(
            "data.tokenizer=bpe needs the library tokenizers, which is not installed; "
            "run: pip install 'shardpar[tokenizers]', or write data.tokenizer=byte"
        ) from error
    return tokenizers


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text {text[max(0, error.start - 10) : error.end + 10]!r} is not valid Unicode "
            f"(\\u{ord(text[error.start]):04x} stands alone); write it in UTF-8"
        ) from error


def _integers(ids: Iterable[int] | np.ndarray) -> list[int]:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).astype(int).tolist()
