"""Tokenizers of all kinds, built small; streaming against decode() of everything; stop strings against a search."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.config import ConfigError
from jaxinfer.request import RequestError
from jaxinfer.tokenizer import MAX_TOKEN_IDS, StopMatcher, Tokenizer

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

PIECES = ["<s>", "</s>", "[SEP]", "   wide  ", "日本", "def ", "▁", "  ", "\n", "👍🏽", "e\u0301", "\x00", "\ufffd"]


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


def test_no_tokenizer_file_is_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "Unknown"}}'])
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_ids_are_bounded(tmp_path: Path) -> None:
    """A table by id has an entry for every id up to the largest."""
    for largest in (MAX_TOKEN_IDS - 1, MAX_TOKEN_IDS, 4_000_000_000):
        model = {"type": "WordLevel", "vocab": {"a": 0, "b": largest}, "unk_token": "a"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
        if largest < MAX_TOKEN_IDS:
            tokenizer = Tokenizer.load(tmp_path)
            assert tokenizer is not None and tokenizer.vocab_size == MAX_TOKEN_IDS
        else:
            with pytest.raises(ConfigError, match=rf"tokenizer\.json has token id {largest}; .* below {MAX_TOKEN_IDS}"):
                Tokenizer.load(tmp_path)


def test_stored_truncation_and_padding_do_not_apply(tmp_path: Path) -> None:
    source = byte_level()
    source.enable_truncation(4)
    source.enable_padding(length=50)
    source.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    text = "abcdefgh" * 5
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 50


def test_vocabulary_counts_added_tokens() -> None:
    source = byte_level()
    assert Tokenizer(source).vocab_size == source.get_vocab_size(with_added_tokens=True)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError, match="prompt: text has a lone surrogate at position 2"):
        KINDS["byte_level"].encode("ab\ud800c")


@given(st.sampled_from(list(KINDS)), st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES))), st.booleans())
def test_ids_are_those_of_the_library(kind: str, pieces: list[str], special: bool) -> None:
    text, tokenizer = "".join(pieces), KINDS[kind]
    expected = tokenizer._tokenizer.encode(text, add_special_tokens=special).ids
    assert tokenizer.encode(text, add_special_tokens=special) == expected


def test_other_threads_run_while_a_long_text_is_encoded(shipped_model: Path) -> None:
    tokenizer = Tokenizer.load(shipped_model)
    assert tokenizer is not None
    encoding, ticks = threading.Event(), 0
    text = "def main(x): return x + 1\n" * 40_000  # about a third of a second

    def tick() -> None:
        nonlocal ticks
        encoding.wait()
        while encoding.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    encoding.set()
    tokenizer.encode(text)
    encoding.clear()
    thread.join()
    assert ticks > 10  # of some hundreds; with the interpreter held there are 2 or 3


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
