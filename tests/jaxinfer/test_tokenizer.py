"""Tokenizers of all kinds, built small; streaming against decode() of everything; stop strings against a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.tokenizer import StopMatcher, Tokenizer

TEXT = [
    "def main(arguments):\n    return [str(a) for a in arguments]\n",
    "Größe, naïve, 東京 and 👍🏽 in one line; \t tabs, too.",
    "for line in file:\n        print(line)\n",
]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("   wide  ", special=False), AddedToken("日本", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁▁", "a", "b", "ab", "▁a", "▁b", "é", "▁東", "\ufffd", "def", "▁def", "(", ")", ":", "\u0301"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "[SEP]", "a", "##b", "##c", "word", ".", "do", "not", "n", "'", "##t", "##\ufffd"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def no_decoder() -> tokenizers.Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = None
    return tokenizer


KINDS = {build.__name__: Tokenizer(build()) for build in (byte_level, sentencepiece, metaspace, word_piece, no_decoder)}


@st.composite
def chunked_ids(draw: st.DrawFn) -> tuple[str, bool, list[list[int]]]:
    kind = draw(st.sampled_from(list(KINDS)))
    vocab_size = KINDS[kind].vocab_size
    special_or_past = st.sampled_from([0, 1, 2, vocab_size, vocab_size + 1000])
    chunk = st.lists(st.one_of(st.integers(0, vocab_size - 1), special_or_past), max_size=6)
    return kind, draw(st.booleans()), draw(st.lists(chunk, max_size=12))


@given(chunked_ids())
def test_streamed_pieces_are_the_decoded_text(case: tuple[str, bool, list[list[int]]]) -> None:
    kind, skip_special, chunks = case
    tokenizer = KINDS[kind]
    decoder = tokenizer.incremental(skip_special_tokens=skip_special)
    text = "".join([decoder.push(chunk) for chunk in chunks]) + decoder.flush()
    assert text == tokenizer.decode([i for chunk in chunks for i in chunk], skip_special_tokens=skip_special)


@given(st.sampled_from(["byte_level", "sentencepiece"]), st.text(max_size=60))
def test_text_survives_the_round_trip(kind: str, text: str) -> None:
    tokenizer, text = KINDS[kind], text.replace("▁", "_")
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = tokenizer.incremental()
    pieces = [decoder.push([token]) for token in ids]
    if kind == "sentencepiece":  # its decoder takes a first space for the one that encoding puts in front of a word
        text = text.removeprefix(" ")
    assert "".join(pieces) + decoder.flush() == text
    assert tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)  # never half a character


def test_characters_come_as_soon_as_they_are_whole() -> None:
    tokenizer = KINDS["byte_level"]
    decoder = tokenizer.incremental()
    one_by_one = [tokenizer.encode(chr(byte), add_special_tokens=False) for byte in range(0x21, 0x7F)]
    assert [decoder.push(ids) for ids in one_by_one] == [chr(byte) for byte in range(0x21, 0x7F)]
    pieces = [decoder.push([token]) for token in tokenizer.encode("🦉x", add_special_tokens=False)]
    assert pieces == [""] * (len(pieces) - 2) + ["🦉", "x"] and len(pieces) > 2


def test_byte_runs_wait_for_their_end() -> None:
    tokenizer = KINDS["sentencepiece"]
    euro = [3 + byte for byte in "€".encode()]
    letter = tokenizer.encode("a", add_special_tokens=False)[-1]
    decoder = tokenizer.incremental()
    assert [decoder.push([token]) for token in (*euro, letter)] == ["", "", "", tokenizer.decode([*euro, letter])]
    broken = tokenizer.incremental()
    assert broken.push([*euro, euro[0], letter]) == tokenizer.decode([*euro, euro[0], letter])  # four U+FFFD


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("def x")
    assert ids[0] == 0 and tokenizer.encode("def x", add_special_tokens=False) == ids[1:]
    for skip, text in ((True, "def x"), (False, "<s>def x</s>")):
        decoder = tokenizer.incremental(skip_special_tokens=skip)
        assert (
            decoder.push([*ids, 1]) + decoder.flush() == text == tokenizer.decode([*ids, 1], skip_special_tokens=skip)
        )


def test_ids_past_the_vocabulary_are_nothing() -> None:
    for tokenizer in KINDS.values():
        assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""
        decoder = tokenizer.incremental()
        assert decoder.push([tokenizer.vocab_size, 10**6]) + decoder.flush() == ""


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "word_piece"])
def test_streaming_work_is_linear(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, work = Tokenizer(KINDS[kind]._tokenizer), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: work.append(len(ids)) or decode(ids, **options))
    decoder = tokenizer.incremental()
    replacement = next(i for i, token in enumerate(tokenizer._all_tokens) if token is not None and "\ufffd" in token)
    ids = list(range(2, 12)) * 20 + [replacement] * 200 + [9] * 200
    for token in ids:
        decoder.push([token])
    decoder.flush()
    assert sum(work) < 12 * len(ids)  # decoding everything at each step would be 300 times the ids


# ---- loading ---------------------------------------------------------------------------------------------------------


def write_model(directory: Path, tokenizer: tokenizers.Tokenizer, **configs: object) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in configs.items():
        (directory / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return directory


def test_no_tokenizer_file_is_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "Unknown"}}'])
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_malformed_config_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.load(write_model(tmp_path, byte_level(), tokenizer_config=content))


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({}, (None, None)),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, (0, 1)),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 1, "eos_token_id": [1, 0]}}, (1, 1)),
        ({"config": {"bos_token_id": None, "eos_token_id": []}}, (None, None)),
    ],
)
def test_special_ids_come_from_the_configs(tmp_path: Path, configs: dict, expected: tuple) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path, byte_level(), **configs))
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == expected


def test_stored_truncation_and_padding_do_not_apply(tmp_path: Path) -> None:
    source = byte_level()
    source.enable_truncation(4)
    source.enable_padding(length=50)
    tokenizer = Tokenizer.load(write_model(tmp_path, source))
    assert tokenizer is not None
    text = "abcdefgh" * 5
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 50


def test_vocabulary_counts_added_tokens() -> None:
    source = byte_level()
    assert Tokenizer(source).vocab_size == source.get_vocab_size(with_added_tokens=True)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate at position 2"):
        KINDS["byte_level"].encode("ab\ud800c")


def test_the_shipped_tokenizer(shipped_model: Path) -> None:
    tokenizer = Tokenizer.load(shipped_model)
    assert tokenizer is not None
    text = "def main() -> None:\n    print('ok')  # ✓\n"
    ids = tokenizer.encode(text)
    decoder = tokenizer.incremental()
    assert "".join(decoder.push([token]) for token in ids) + decoder.flush() == text


# ---- stop strings ----------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the match that ends first; of those, the longest."""
    ends = [(end, stop) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    if not ends:
        return None
    first_end = min(end for end, _ in ends)
    return first_end - max(len(stop) for end, stop in ends if end == first_end), first_end


def could_begin(text: str, stops: list[str]) -> int:
    """Length of the longest suffix of the text that is a proper beginning of a stop string."""
    beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
    return max((n for n in range(1, len(text) + 1) if text[-n:] in beginnings), default=0)


ABC = st.text("abc", min_size=1, max_size=5)  # few letters: many near misses


@given(st.lists(ABC, max_size=4), st.lists(st.text("abcx", max_size=6), max_size=8), st.booleans())
def test_matching_does_not_depend_on_the_chunks(stops: list[str], chunks: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    text, emitted, found = "".join(chunks), "", first_stop("".join(chunks), stops)
    seen = ""
    for chunk in chunks:
        piece, matched = matcher.push(chunk)
        seen, emitted = seen + chunk, emitted + piece
        assert matched == (found is not None and len(seen) >= found[1])
        if not matched:
            assert emitted == seen[: len(seen) - could_begin(seen, stops)]  # exactly the rest is held back
    if found is None:
        assert emitted + matcher.flush() == text
    else:
        assert matcher.flush() == ""
        assert emitted == text[: found[1] if include else found[0]]
        assert matcher.push("abc") == ("", True)


def test_a_stop_inside_another() -> None:
    matcher = StopMatcher(["abcd", "b"])
    assert matcher.push("xa") == ("x", False)
    assert matcher.push("bcd") == ("a", True)


def test_the_longer_of_two_that_end_together() -> None:
    assert StopMatcher(["\n", "END\n"]).push("so END\nmore") == ("so ", True)
    assert StopMatcher(["\n", "END\n"], include_stop=True).push("so END\nmore") == ("so END\n", True)


@pytest.mark.parametrize("stop", ["]", "^a", "\\", "-z", "[a-z]"])
def test_stop_strings_are_not_patterns(stop: str) -> None:
    assert StopMatcher(["b-", stop]).push(f"mn{stop}tail") == ("mn", True)
    assert StopMatcher([stop]).push("mnop") == ("mnop", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopMatcher(["a", ""])


def test_matching_work_is_linear() -> None:
    steps = []

    class Counted(list):
        def __getitem__(self, index):
            steps.append(index)
            return super().__getitem__(index)

    matcher = StopMatcher(["a" * 255 + "b", "aab" * 80])
    matcher._fallback = Counted(matcher._fallback)
    for _ in range(2000):
        matcher.push("aac")
    assert 2000 < len(steps) <= 6000  # never more steps back than characters
