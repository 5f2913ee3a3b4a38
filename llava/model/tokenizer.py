"""Llama's tokenizer with the ids of sentencepiece, which LLaVA was trained with."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import transformers
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2, sentencepiece_pb2
from tokenizers import Encoding, PreTokenizedString, Token, Tokenizer

from llava.storage import dump_json, read_json, write_atomically

SPACE = "▁"  # what sentencepiece writes for a space


class LlamaTokenizer(transformers.LlamaTokenizer):
    """transformers' Llama tokenizer, with text split by `tokenizer.model` itself.

    transformers turns the sentencepiece model into a list of pairs to merge. Sentencepiece merges
    the pair whose result has the highest score, the leftmost among equals, and a list of pairs
    cannot say that: runs of spaces come out as other ids. So ids come from sentencepiece, by the
    rules of the tokenizer that LLaVA uses (`use_fast=False`), also where text follows a special
    token. Vocabulary, added tokens, decoding, padding and truncation stay transformers' own, and
    so does a tokenizer that was saved without a `tokenizer.model`.

    The class has transformers' name because `save_pretrained` writes it for other tools to load.

    Args:
        *args, **kwargs: as in transformers.
        vocab_file: the `tokenizer.model`; None for a tokenizer without one.
        legacy: whether text after a special token starts with a space piece too. LLaVA's default
            is True, transformers' is False; None means LLaVA's where there is a `vocab_file`.
        add_prefix_space: whether a text starts with a space piece; None means yes.

    Raises:
        ValueError: `tokenizer.json` and `tokenizer.model` give an id to different tokens.
    """

    _tokenizer: Any

    def __init__(
        self,
        *args: Any,
        vocab_file: str | None = None,
        legacy: bool | None = None,
        add_prefix_space: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if legacy is None:
            legacy = vocab_file is not None
        kwargs |= {"legacy": legacy, "add_prefix_space": add_prefix_space}
        super().__init__(*args, vocab_file=vocab_file, **kwargs)
        self.init_kwargs["legacy"] = legacy  # transformers forgets to save it
        self.sentencepiece_model: bytes | None = None
        if vocab_file is not None:
            self.sentencepiece_model = Path(vocab_file).read_bytes()
            splitter = _Splitter(
                self.sentencepiece_model, str(self.unk_token), legacy, add_prefix_space is not False
            )
            splitter.check_vocabulary(self._tokenizer)
            self._tokenizer = _Backend(self._tokenizer, splitter)

    @classmethod
    def convert_to_native_format(  # type: ignore[override]
        cls, **kwargs: Any
    ) -> dict[str, Any]:
        """Leave the symbols that sentencepiece knows to sentencepiece.

        transformers would make them special tokens, at which a text is cut into two.
        """
        native = super().convert_to_native_format(**kwargs)
        native.pop("additional_special_tokens", None)
        return native

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Also write what transformers leaves out: `tokenizer.model`, BOS and EOS settings."""
        names = super()._save_pretrained(save_directory, *args, **kwargs)
        if self.sentencepiece_model is None:
            return names
        prefix = kwargs.get("filename_prefix")
        lead = f"{prefix}-" if prefix else ""
        settings = Path(save_directory, f"{lead}tokenizer_config.json")
        flags = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        saved = read_json(settings) | flags
        write_atomically(settings, dump_json(dict(sorted(saved.items()))))
        model = Path(save_directory, f"{lead}tokenizer.model")
        model.write_bytes(self.sentencepiece_model)
        return (*names, str(model))


class _Splitter:
    """Cuts a section of text, without special tokens in it, into sentencepiece's pieces.

    Args:
        model: bytes of the `tokenizer.model`.
        unk: text of the unknown token.
        legacy: every section gets the model's own leading space; otherwise only the first does.
        prefix: whether there is a leading space at all.
    """

    def __init__(self, model: bytes, unk: str, legacy: bool, prefix: bool) -> None:
        self.model, self.unk, self.legacy, self.prefix = model, unk, legacy, prefix
        self.by_model = legacy and prefix
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
        self.strips = proto.normalizer_spec.remove_extra_whitespaces
        if not self.by_model:
            proto.normalizer_spec.add_dummy_prefix = False
        self.processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.unk_pieces = len(self.processor.encode(unk))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Splitter, (self.model, self.unk, self.legacy, self.prefix)

    def check_vocabulary(self, backend: Tokenizer) -> None:
        """Raise ValueError where sentencepiece and `backend` name an id differently."""
        added = backend.get_added_tokens_decoder()
        for index in range(self.processor.get_piece_size()):
            ours, theirs = self.processor.id_to_piece(index), backend.id_to_token(index)
            if ours != theirs and index not in added:
                raise ValueError(
                    f"token {index} is {ours!r} in tokenizer.model and {theirs!r} in tokenizer.json"
                )

    def pieces(self, section: str, first: bool) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of every piece of a section; places are characters of it.

        What has no character of its own gets the character after it (a leading space) or
        the one that it is part of (the bytes of a character outside the vocabulary).

        Args:
            first: whether the text begins with this section.
        """
        lead, skipped = "", 0
        if not self.by_model:
            lead = SPACE if first and self.prefix else ""
            section = section.replace(SPACE, " ")
            if self.strips and (lead + section).startswith((SPACE, " ")):
                # The model would drop leading spaces. As LLaVA's tokenizer does, put a word before
                # them and leave its pieces out.
                lead, skipped = self.unk + lead, self.unk_pieces
        fed = lead + section
        encoded = self.processor.encode(fed, out_type="serialized_proto")
        text = sentencepiece_pb2.SentencePieceText.FromString(encoded)  # type: ignore[attr-defined]
        found = text.pieces[skipped:]
        place = {byte: index for index, byte in enumerate(_byte_places(fed))}
        pieces = []
        for piece in found:
            start = max(place[piece.begin] - len(lead), 0)
            end = max(place[piece.end] - len(lead), 0)
            pieces.append((piece.id, start, end if end > start else min(start + 1, len(section))))
        return pieces


class _Backend:
    """A `tokenizers.Tokenizer` with another way to encode; all else is passed on to it."""

    def __init__(self, tokenizer: Tokenizer, splitter: _Splitter) -> None:
        object.__setattr__(self, "_tokenizer", tokenizer)
        object.__setattr__(self, "_splitter", splitter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Backend, (self._tokenizer, self._splitter)

    def encode(
        self,
        sequence: str | Sequence[str],
        pair: str | Sequence[str] | None = None,
        is_pretokenized: bool = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encode one text, or two, as `tokenizers.Tokenizer.encode` does."""
        texts = [sequence] if pair is None else [sequence, pair]
        read: Callable[[Any], Encoding] = self._words if is_pretokenized else self._text
        return self._tokenizer.post_process(
            *(read(text) for text in texts), add_special_tokens=add_special_tokens
        )

    def encode_batch(
        self, input: Sequence[Any], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """Encode texts, or pairs of texts, padded to one length if padding is on."""
        encodings = []
        for item in input:
            # A text, or the words of one, or a pair of either.
            single = isinstance(item[0] if is_pretokenized and item else item, str)
            given = [item] if single or not item else item
            pair = given[1] if len(given) > 1 else None
            encodings.append(self.encode(given[0], pair, is_pretokenized, add_special_tokens))
        padding = self._tokenizer.padding
        if padding is not None:
            names = ("direction", "pad_id", "pad_type_id", "pad_token")
            longest = max((len(encoding) for encoding in encodings), default=0)
            for encoding in encodings:
                encoding.pad(longest, **{name: padding[name] for name in names})
        return encodings

    def _words(self, words: Sequence[str]) -> Encoding:
        return Encoding.merge(
            [self._text(word, index) for index, word in enumerate(words)], growing_offsets=False
        )

    def _text(self, text: str, word: int | None = None) -> Encoding:
        """Encode a text without the special tokens around it."""
        place = list(_byte_places(text))  # tokenizers counts bytes here, and makes them characters
        tokens = [
            Token(index, self._tokenizer.id_to_token(index), (place[start], place[end]))
            for index, start, end in self._split(text)
        ]
        split = PreTokenizedString(text)
        split.tokenize(lambda _: tokens)
        return split.to_encoding(word_idx=word)

    def _split(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Return (id, start, end) of every token; places are characters."""
        known = self._tokenizer.get_added_tokens_decoder()
        if self._tokenizer.encode_special_tokens:
            known = {index: token for index, token in known.items() if not token.special}
        ids = {token.content: index for index, token in known.items()}
        start = 0
        for match in _pattern(known.values()).finditer(text) if known else ():
            index = ids[next(filter(None, match.groups()))]
            yield from self._section(text, start, match.start(), known[index].special)
            yield index, match.start(), match.end()
            start = match.end()
        yield from self._section(text, start, len(text), False)

    def _section(
        self, text: str, start: int, end: int, before_special: bool
    ) -> list[tuple[int, int, int]]:
        first = start == 0
        if start == end and not (first and text and not self._splitter.by_model):
            return []
        pieces = self._splitter.pieces(text[start:end], first)
        lonely = first and before_special and not self._splitter.by_model
        if lonely and [self._tokenizer.id_to_token(piece[0]) for piece in pieces] == [SPACE]:
            return []  # a leading space alone is left out before a special token
        return [(index, start + left, start + right) for index, left, right in pieces]


def _byte_places(text: str) -> Iterator[int]:
    """Return where every character of `text` starts in UTF-8, and where the last one ends."""
    return accumulate((len(character.encode()) for character in text), initial=0)


def _pattern(tokens: Any) -> re.Pattern[str]:
    """Make a pattern that finds added tokens, the longest first, with a group for each."""
    parts = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        part = f"({re.escape(token.content)})"
        if token.single_word:
            part = f"(?<![^ ]){part}(?![^ ])"
        spaces = r"\s*"
        parts.append(f"{spaces * token.lstrip}{part}{spaces * token.rstrip}")
    return re.compile("|".join(parts))
