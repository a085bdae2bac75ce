"""One door to the tokenizers library: what a file of a training run carries changes no text, and no fault passes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llmbuild.errors import InputError
from llmbuild.profiler.heldout import windows
from llmbuild.runtime.tokenizer import Encoded, Tokenizer
from llmbuild.spec.recipe import Quality

SPECIAL = ("<s>", "</s>", "<unk>")
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])


def byte_fallback() -> Any:
    """A tokenizer as Llama's: words, and a token for each byte."""
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    for word in ("▁", "a", "b", "▁a", "▁ab", "ab", "c"):
        vocabulary[word] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    made = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def byte_level() -> Any:
    """A tokenizer as GPT-2's, without merges."""
    made = Library(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def word_pieces() -> Any:
    """A tokenizer as BERT's."""
    words = ["[UNK]", "a", "b", "##a", "##b", ".", "def"]
    made = Library(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def unigram() -> Any:
    """A tokenizer as T5's, with a token for each byte."""
    words = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.5), ("a", -2.0), ("b", -2.0), ("ab", -2.5)]
    made = Library(models.Unigram(words + [(f"<0x{b:02X}>", -9.0) for b in range(256)], unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


MAKERS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "word pieces": word_pieces,
    "unigram": unigram,
}
LOSSLESS = ("byte level", "byte fallback")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: saved(make(), folder / f"{name}.json") for name, make in MAKERS.items()}


def saved(made: Any, path: Path) -> Tokenizer:
    made.save(str(path))
    return Tokenizer(path)


def test_what_a_training_run_saved_changes_no_text(tmp_path: Path) -> None:
    made, text = byte_fallback(), "ab ab ab"
    plain = saved(made, tmp_path / "plain.json").encode(text)
    made.enable_truncation(2)
    made.enable_padding(length=40, pad_id=1, pad_token="</s>")
    made.model.dropout = 0.9
    assert saved(made, tmp_path / "saved.json").encode(text) == plain
    assert len(plain.ids) == 3


def test_held_out_text_is_read_whole(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(40)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "held.txt").write_text("0123456789" * 72)
    found = windows(Quality(files=(str(tmp_path / "held.txt"),), tokens=720), tmp_path / "tokenizer.json", 256)
    assert found.shape == (5, 128)


def test_what_comes_before_a_text_comes_once_and_what_ends_it_is_left_out(tmp_path: Path) -> None:
    made = byte_fallback()
    made.post_processor = BOTH
    tokenizer = saved(made, tmp_path / "t.json")
    own = tokenizer.encode("ab", add_special_tokens=False).tokens
    assert tokenizer.behind == ("</s>",)
    assert tokenizer.encode("ab") == Encoded((0, *own), ("<s>",))
    assert tokenizer.encode("<s>ab").tokens[:2] != (0, 0)
    assert tokenizer.encode("<s>ab") == tokenizer.encode_chat("<s>ab")
    assert tokenizer.encode_chat("ab").tokens == own
    assert tokenizer.encode("").tokens == (0,)


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("<s> <unk> $A", "c", [0, 2]),
        ("<s> <unk> $A", "<s>c", [0]),
        ("<s> <unk> $A", "<unk>c", [0, 2]),
        ("$A </s>", "c", []),
    ],
)
def test_a_text_keeps_the_tokens_that_it_begins_with(
    tmp_path: Path, template: str, text: str, expected: list[int]
) -> None:
    made = byte_fallback()
    special = [(name, i) for i, name in enumerate(SPECIAL)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    found = saved(made, tmp_path / "t.json").encode(text).ids
    assert [token for token in found if token < len(SPECIAL)] == expected


def test_a_post_processor_that_doubles_the_text_is_refused(tmp_path: Path) -> None:
    made = byte_fallback()
    made.post_processor = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    with pytest.raises(InputError, match="does not put the text once"):
        saved(made, tmp_path / "t.json")


@pytest.mark.parametrize(
    "content", ["", "{}", "[", "null", "version https://git-lfs.github.com/spec/v1", '{"model":{}}']
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=r"t\.json: the tokenizer cannot be read"):
        Tokenizer(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"none\.json: the tokenizer cannot be read"):
        Tokenizer(tmp_path / "none.json")


def test_a_panic_of_the_library_is_an_error_of_ours(opened: dict[str, Tokenizer]) -> None:
    class Panic(BaseException):
        pass

    class Panics:
        def encode(self, *_: Any, **__: Any) -> None:
            raise Panic("index out of\nbounds")

        def id_to_token(self, _: int) -> str:
            raise KeyboardInterrupt

    tokenizer = Tokenizer(opened["byte level"].path)
    assert tokenizer.decode([5]) == tokenizer.name(5)
    tokenizer._library = Panics()
    with pytest.raises(InputError, match=r"the text cannot be tokenized: index out of bounds"):
        tokenizer.encode("a")
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([1])


def test_a_panic_while_a_file_is_read_says_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    byte_level().save(str(tmp_path / "t.json"))
    body = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(
        json.dumps({**body, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}})
    )
    with pytest.raises(InputError, match="cannot be read: Precompiled: Error"):
        Tokenizer(tmp_path / "t.json")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [("a\ud800", r"U\+D800 alone at character 1"), (3, "int 3"), (b"a", "a bytes"), (None, "None"), (["a"], "a list")],
)
def test_what_is_no_text_is_refused(opened: dict[str, Tokenizer], text: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        opened["byte level"].encode(text)


@pytest.mark.parametrize("tokens", ["abc", [1.5], [-1], [2**40], [[1], [2]], [[1], [2, 3]], None, [True], 5, {1}])
def test_what_are_no_tokens_is_refused(opened: dict[str, Tokenizer], tokens: Any) -> None:
    with pytest.raises(InputError, match="tokens"):
        opened["byte level"].decode(tokens)


def test_tokens_that_the_vocabulary_lacks_say_nothing(opened: dict[str, Tokenizer]) -> None:
    tokenizer = opened["byte level"]
    ids = tokenizer.encode("né").ids
    assert tokenizer.decode([ids[0], 5000, *ids[1:], 2**32 - 1]) == "né"
    assert tokenizer.name(5000) == "<5000>"


@settings(max_examples=60)
@given(st.sampled_from(LOSSLESS), st.text(max_size=30))
def test_any_text_comes_back(opened: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = opened[name]
    if name == "byte fallback":
        text = text.replace("▁", "")
        if any(word in text for word in SPECIAL):
            return
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@settings(max_examples=120)
@given(st.sampled_from(sorted(MAKERS)), st.lists(st.integers(0, 270), max_size=16), st.data())
def test_the_stream_says_what_all_tokens_say(
    opened: dict[str, Tokenizer], name: str, ids: list[int], data: Any
) -> None:
    tokenizer, split = opened[name], data.draw(st.integers(0, len(ids)))
    stream = tokenizer.decoder(ids[:split])
    pieces = [*map(stream.push, ids[split:]), stream.end()]
    whole, begun = tokenizer.decode(ids), tokenizer.decode(ids[:split])
    if whole.startswith(begun):
        assert begun + "".join(pieces) == whole
    library = Library.from_file(str(tokenizer.path)).decode(ids)
    if "�" not in library or name == "byte level":
        assert whole == library


def test_an_unknown_decoder_is_refused_when_text_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("llmbuild.runtime.detokenize", fromlist=["_STAGES"])._STAGES, "Fuse")
    tokenizer = saved(byte_fallback(), tmp_path / "t.json")
    assert tokenizer.encode("ab").ids
    with pytest.raises(InputError, match="decoder 'Fuse' is not supported; taken are ByteLevel"):
        tokenizer.decode([1])


def test_the_saved_file_is_read_as_it_is(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(2)
    made.save(str(tmp_path / "t.json"))
    before = (tmp_path / "t.json").read_bytes()
    Tokenizer(tmp_path / "t.json").encode("abc")
    assert (tmp_path / "t.json").read_bytes() == before
    assert json.loads(before)["truncation"]
