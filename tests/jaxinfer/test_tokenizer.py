"""Tokenizers of all kinds, built small; streaming against decode() of everything; stop strings against a search."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxinfer.config import ConfigError
from jaxinfer.detokenize import ByteDecoder, ChainDecoder, WindowDecoder, clean_up_spaces
from jaxinfer.request import RequestError
from jaxinfer.tokenizer import MAX_TOKEN_IDS, StopMatcher, Tokenizer
from jaxinfer.tokenizer_config import read_settings

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


def strips_three() -> tokenizers.Tokenizer:
    """Two replacements, and up to three spaces off the beginning."""
    tokenizer = sentencepiece()
    replace = decoders.Replace("▁", " "), decoders.Replace("ab", "  ")
    tokenizer.decoder = decoders.Sequence([*replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 3)])
    return tokenizer


def not_fused() -> tokenizers.Tokenizer:
    """Like gemma's, and no two steps make one text of the tokens."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return tokenizer


def vanishing() -> tokenizers.Tokenizer:
    """A token that is replaced by nothing ends a run of bytes all the same."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", ""), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def strips_each() -> tokenizers.Tokenizer:
    """Strips every token, and at its end: no table knows it."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 0, 1)]
    )
    return tokenizer


def fused() -> tokenizers.Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


CHAINS = (sentencepiece, strips_three, not_fused, fused)
WINDOWS = (metaspace, word_piece, no_decoder, vanishing, strips_each)
KINDS = {build.__name__: Tokenizer(build()) for build in (byte_level, *CHAINS, *WINDOWS)}

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


def test_each_kind_has_the_decoder_made_for_it() -> None:
    made = {name: type(tokenizer.incremental()) for name, tokenizer in KINDS.items()}
    assert made.pop("byte_level") is ByteDecoder
    assert all(made.pop(build.__name__) is ChainDecoder for build in CHAINS)
    assert set(made.values()) == {WindowDecoder} and len(made) == len(WINDOWS)


class CountedTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, ids: list[int], **options: bool) -> str:
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("kind", [build.__name__ for build in WINDOWS])
def test_windows_decode_a_linear_number_of_ids(kind: str) -> None:
    decoder = KINDS[kind].incremental()
    assert isinstance(decoder, WindowDecoder)
    counted = decoder._tokenizer = CountedTokenizer(decoder._tokenizer)  # type: ignore[assignment]
    replacement = next(i for i, token in enumerate(decoder._tokens) if token is not None and "\ufffd" in token)
    ids = list(range(2, 12)) * 20 + [replacement] * 200 + [9] * 200
    for token in ids:
        decoder.push([token])
    decoder.flush()
    assert counted.num_decoded < 12 * len(ids)  # decoding everything at each step would be 300 times the ids


@pytest.mark.parametrize("kind", ["byte_level", *(build.__name__ for build in CHAINS)])
def test_tables_look_every_id_up_once_and_hold_no_more_than_a_run(kind: str) -> None:
    looked_up = []

    class Counted(list):
        def __getitem__(self, index):
            looked_up.append(index)
            return super().__getitem__(index)

    decoder = KINDS[kind].incremental()
    decoder._table = Counted(decoder._table)  # type: ignore[attr-defined]
    ids = [KINDS[kind].encode("a", add_special_tokens=False)[-1], 3 + 0xE2, 3 + 0x82] * 500
    for token in ids:
        decoder.push([token])
        assert len(getattr(decoder, "_run", ())) <= 2
    decoder.flush()
    assert looked_up == ids


CLEANED = [
    " ", "  ", " .", " ?", " !", " ,", "'", " '", "' ", " ' ", "n", " n", "n't", " n't", "'m", " 'm", "'s", " 's",
    "'v", " 've", "ve", "'r", " 're", "re", "t", "e", "word", ".", "do", "not", "\n", "é",
]  # fmt: skip


def cleaning() -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(CLEANED)}, unk_token=" "))
    tokenizer.decoder = decoders.Fuse()
    return Tokenizer(tokenizer, dataclasses.replace(read_settings("no such directory"), clean_up_spaces=True))


CLEANING = cleaning()


@given(st.lists(st.lists(st.integers(0, len(CLEANED) - 1), max_size=4), max_size=30))
@settings(max_examples=1000)
def test_cleaned_pieces_are_the_cleaned_text(chunks: list[list[int]]) -> None:
    tokenizer = CLEANING
    decoder = tokenizer.incremental()
    ids = [token for chunk in chunks for token in chunk]
    text = "".join([decoder.push(chunk) for chunk in chunks]) + decoder.flush()
    assert text == tokenizer.decode(ids) == clean_up_spaces("".join(CLEANED[token] for token in ids))


def test_cleaning_holds_little_back() -> None:
    decoder = CLEANING.incremental()
    pieces = [decoder.push([CLEANED.index(token)]) for token in ("word", "word", " ", "not", " n't", " .", "word")]
    assert [*pieces, decoder.flush()] == ["wor", "dwor", "d", " no", "t", "n't", ".wor", "d"]


@pytest.mark.parametrize("switch", ["clean_up_tokenization_spaces", None])
def test_spaces_are_cleaned_up_where_the_config_says_so(switch: str | None, tmp_path: Path) -> None:
    for build, cleans in ((word_level, True), (byte_level, False)):  # for BPE it would be damage
        build().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({switch: True} if switch else {}))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer is not None
        ids = tokenizer.encode("do n't .", add_special_tokens=False)
        assert tokenizer.decode(ids) == ("don't." if cleans and switch else "do n't .")


def word_level() -> tokenizers.Tokenizer:
    words = ["do", "n't", ".", "?"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_no_tokenizer_file_is_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"has {name} but no tokenizer\.json.*save_pretrained.*or remove the file"):
        Tokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path) is not None


def loaded(directory: Path, settings: dict[str, object] | None = None, **files: dict[str, object]) -> Tokenizer:
    """byte_level() with a tokenizer_config.json and other files."""
    byte_level().save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings or {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def test_tokens_of_the_config_are_added(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, {"eos_token": "<eos>", "image_token": "<image>", "extra_special_tokens": ["<x>"]})
    first = KINDS["byte_level"].vocab_size
    ids = tokenizer.encode("<eos><image><x>a", add_special_tokens=False)
    assert ids[:3] == [first, first + 1, first + 2] and tokenizer.vocab_size == first + 3
    assert tokenizer.decode(ids) == "a" and tokenizer.decode(ids, skip_special_tokens=False) == "<eos><image><x>a"


def test_properties_of_the_config_replace_those_of_the_tokenizer(tmp_path: Path) -> None:
    entry = {"content": "日本", "special": True, "lstrip": True, "normalized": False}
    tokenizer = loaded(tmp_path, {"added_tokens_decoder": {"341": entry}})
    ids = tokenizer.encode("a  日本", add_special_tokens=False)
    assert len(ids) == 2 and tokenizer.decode(ids) == "a"
    plain = loaded(tmp_path)
    assert plain.decode(plain.encode("a  日本", add_special_tokens=False)) == "a  日本"


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    named = {"eos_token": {"content": "日本", "lstrip": False}, "additional_special_tokens": ["<x>"]}
    tokenizer = loaded(tmp_path, {}, special_tokens_map=named, added_tokens={"<y>": 700})
    assert read_settings(tmp_path).special_tokens == {"eos_token": "日本"}
    ids = tokenizer.encode("日本<x><y>", add_special_tokens=False)
    assert len(ids) == 3 and tokenizer.decode(ids) == "<y>"  # what is named is special, whatever tokenizer.json says


def test_special_tokens_in_a_text_may_be_text(tmp_path: Path) -> None:
    assert loaded(tmp_path).encode("</s>", add_special_tokens=False) == [1]
    split = loaded(tmp_path, {"split_special_tokens": True}).encode("</s>", add_special_tokens=False)
    assert len(split) > 1 and 1 not in split


@pytest.mark.parametrize("add_bos", [True, False])
def test_what_is_put_around_a_text_is_up_to_tokenizer_json(add_bos: bool, tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, {"bos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": add_bos})
    assert tokenizer.encode("a") == KINDS["byte_level"].encode("a")


@pytest.mark.parametrize(
    ("config", "model_type", "tokens"),
    [
        ({"legacy": False}, "llama", ["▁a", "<s>", "a"]),
        ({}, "llama", ["▁a", "<s>", "a"]),
        ({}, None, ["▁a", "<s>", "a"]),
        ({"legacy": True}, "llama", ["▁a", "<s>", "▁a"]),
        ({"add_prefix_space": False}, "llama", ["a", "<s>", "a"]),
        ({}, "mistral", ["<unk>", "a", "<s>", "<unk>", "a"]),  # tokenizer.json as it is
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "llama", ["<unk>", "a", "<s>", "<unk>", "a"]),
    ],
)
def test_llamas_go_by_their_legacy_flag(
    config: dict[str, object], model_type: str | None, tokens: list[str], tmp_path: Path
) -> None:
    """As transformers 5: tests/goldens_chat/llama2 and mistral have whole prompts."""
    source = sentencepiece()
    source.normalizer = normalizers.Prepend("_")  # to tell which was used
    source.pre_tokenizer = None
    source.model.byte_fallback = False
    source.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"} | config))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("a<s>a", add_special_tokens=False)
    assert [tokenizer._tokenizer.id_to_token(token) for token in ids] == tokens
    assert ("bos_token" in read_settings(tmp_path).special_tokens) == ("<unk>" not in tokens)


def test_a_byte_level_llama_is_taken_as_it_is(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, {"tokenizer_class": "LlamaTokenizer"}, config={"model_type": "llama"})
    assert tokenizer.encode("a b") == KINDS["byte_level"].encode("a b")
    assert read_settings(tmp_path).special_tokens == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split_special_tokens": "yes"}, "split_special_tokens='yes' is neither true nor false"),
        ({"eos_token": 3}, "eos_token: 3 is neither a token's text nor an object with its content"),
        ({"eos_token": {"content": "x", "lstrip": 1}}, "eos_token: lstrip=1 is neither true nor false"),
        ({"extra_special_tokens": 3}, "extra_special_tokens=3 is neither a list nor a dict of tokens"),
        ({"extra_special_tokens": [3]}, "extra_special_tokens: 3 is neither a token's text"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(config: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        loaded(tmp_path, config)
    assert str(tmp_path / "tokenizer_config.json") in str(error.value)


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
