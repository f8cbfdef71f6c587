"""Cached tokens are used only if nothing that determines them has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lorakit.data import cache, shards
from lorakit.data.cache import CACHED_ROWS, EncodedCache, encoding_key, source_digest, write_arrays
from lorakit.data.encode import EncodedSplit, encode_split
from lorakit.data.examples import ChatExample, ClassificationExample, Segment, TextExample
from lorakit.data.notes import split_notes
from lorakit.data.sources import Split, load_split
from lorakit.errors import DataError

ROWS = [{"prompt": f"{n} is", "completion": " " + "x" * (n % 17)} for n in range(CACHED_ROWS)]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def split_of(rows: list[dict[str, Any]] = ROWS, fingerprint: str = "0") -> Split:
    return Split("train", rows, "rows.jsonl", fingerprint)


def example(row: Any) -> TextExample:
    return TextExample((Segment(row["prompt"], False), Segment(row["completion"], True)))


def labelled(row: Any) -> ClassificationExample:
    return ClassificationExample(row["prompt"], row["completion"], len(row["completion"]))


def scored(row: Any) -> ClassificationExample:
    return ClassificationExample(row["prompt"], None, len(row["completion"]) / 3)


class Cached:
    """``encode_split`` with a cache in ``folder``, and its messages."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.said: list[str] = []

    def encode(
        self,
        split: Split | None = None,
        to_example: Callable[[Any], Any] = example,
        max_length: int = 15,
        extra: bytes = b"",
        write: bool = True,
        **config: Any,
    ) -> EncodedSplit:
        key = encoding_key(self.tokenizer, {"max_length": max_length, **config}, extra)
        assert key is not None
        kept = EncodedCache(key, self.said.append, write, self.folder)
        return encode_split(split or split_of(), to_example, self.tokenizer, max_length, cache=kept)

    def hit(self, *given: Any, **options: Any) -> bool:
        self.said.clear()
        self.encode(*given, **options)
        return "read from the cache" in self.said[0]

    @property
    def entries(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def cached(tmp_path: Path, tokenizer: Any) -> Cached:
    return Cached(tmp_path / "tokens", tokenizer)


def assert_equal(a: EncodedSplit, b: EncodedSplit) -> None:
    for name in ("input_ids", "loss_mask", "offsets", "token_type_ids"):
        first, second = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(first, second)
        assert (first is None) or first.dtype == second.dtype
    assert a.labels == b.labels
    assert [type(label) for label in a.labels or ()] == [type(label) for label in b.labels or ()]
    assert a.counts == b.counts


def test_skipped_rows_are_cached(tmp_path: Path, tokenizer: Any) -> None:
    """They are named after the split that is read, even if its file has moved."""

    def refuse(row: Any) -> TextExample:
        if row["prompt"] in ("3 is", "9 is"):
            raise DataError("refused")
        return example(row)

    said: list[str] = []
    found = []
    for source in ("rows.jsonl", "moved.jsonl"):
        kept = EncodedCache("key", said.append, True, tmp_path)
        split = Split("train", ROWS, source, "0")
        found.append(encode_split(split, refuse, tokenizer, 15, cache=kept, skip_bad=True))
        assert split_notes(found[-1], split, 99)[0] == (
            f"train: 2 of {len(ROWS):,} rows skipped (task.on_bad_row: skip): {source}, row 4: "
            f"refused; {source}, row 10: refused"
        )
    assert "read from the cache" in said[-1]
    assert_equal(*found)
    assert len(found[0]) == len(ROWS) - 2


def test_reading_returns_what_was_stored(cached: Cached, tokenizer: Any) -> None:
    plain = encode_split(split_of(), example, tokenizer, 15)
    assert plain.counts.truncated_rows > plain.counts.cut_completions > 0
    assert_equal(cached.encode(), plain)
    assert cached.said[0].startswith("train: 2,000 rows tokenized in ")
    assert_equal(cached.encode(), plain)
    assert cached.said[1:] == [f"train: 2,000 rows read from the cache {cached.folder}"]
    assert plain.trained_counts.tolist() == [int(row.loss_mask[1:].sum()) for row in rows_of(plain)]


def rows_of(split: EncodedSplit) -> list[Any]:
    return [split[index] for index in range(len(split))]


@pytest.mark.parametrize("to_example", [labelled, scored])
def test_labels_and_types(tmp_path: Path, tiny_bert: Path, to_example: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    plain = encode_split(split_of(), to_example, tokenizer, 15)
    cached = Cached(tmp_path, tokenizer)
    for _ in range(2):
        assert_equal(cached.encode(to_example=to_example), plain)
    assert "read" in cached.said[-1]


def test_chats_that_become_several_rows(cached: Cached, tokenizer: Any) -> None:
    """The entry has the number of rows of the split, and its counts."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}</s>"
        "{% endfor %}"
    )

    def chat(row: Any) -> ChatExample:
        texts = ("ab", row["completion"][:3] or "c", "d", "e")
        roles = ("user", "assistant") * 2
        messages = ({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))
        return ChatExample(tuple(messages))

    plain = encode_split(split_of(), chat, tokenizer, 30)
    assert len(plain) == 2 * plain.counts.rows == 2 * len(split_of())
    for _ in range(2):
        assert_equal(cached.encode(to_example=chat, max_length=30), plain)
    assert "read from the cache" in cached.said[-1]
    assert len(split_notes(plain, split_of(), 30)) == 1


def test_every_input_of_the_key_causes_a_miss(
    cached: Cached,
) -> None:
    assert not cached.hit()
    assert cached.hit()
    assert not cached.hit(split_of(fingerprint="1"))
    assert not cached.hit(max_length=16)
    assert not cached.hit(extra=b"another file")
    assert not cached.hit(template="{x}")
    assert cached.hit()


def test_changed_code_changes_the_digest(tmp_path: Path) -> None:
    sources = {"first": "x + 1\n", "same": "x + 1\n", "changed": "x + 2\n"}
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(source)
    first, same, changed = (source_digest(tmp_path / name) for name in sources)
    assert first == same
    assert first != changed


def test_another_tokenizer_or_template_causes_a_miss(cached: Cached) -> None:
    assert not cached.hit()
    cached.tokenizer.chat_template = "{{ messages }}"
    assert not cached.hit()
    cached.tokenizer.add_tokens(["xx"])
    assert not cached.hit()
    cached.tokenizer.eos_token = "<s>"
    assert not cached.hit()
    assert cached.hit()


def test_the_last_use_of_a_tokenizer_does_not_cause_a_miss(cached: Cached) -> None:
    assert not cached.hit()
    cached.tokenizer.pad_token = cached.tokenizer.eos_token
    key = encoding_key(cached.tokenizer, {})
    cached.tokenizer(["a", "bbb"], truncation=True, max_length=2, padding=True)
    backend = cached.tokenizer.backend_tokenizer
    before = backend.truncation, backend.padding
    assert None not in before
    assert encoding_key(cached.tokenizer, {}) == key
    assert (backend.truncation, backend.padding) == before


def test_other_data_or_another_limit_causes_a_miss(cached: Cached, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"

    def loaded(rows: list[Any], limit: int | None = None) -> Split:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = load_split(str(file), "train", limit=limit)
        assert found is not None
        return found

    more = [*ROWS, *ROWS[:1]]
    assert not cached.hit(loaded(more))
    assert not cached.hit(loaded([*ROWS, {"prompt": "a", "completion": " b"}]))
    assert not cached.hit(loaded(more, limit=CACHED_ROWS))
    assert cached.hit(loaded(more))


def test_few_rows_are_not_cached(cached: Cached) -> None:
    cached.encode(split_of(ROWS[:-1]))
    assert cached.said == cached.entries == []


def test_without_write_entries_are_only_read(cached: Cached) -> None:
    assert not cached.hit(write=False)
    assert cached.entries == []
    assert not cached.hit()
    assert cached.hit(write=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: re.sub(
            rb'("input_ids": {"dtype": "U16", "shape": \[)2', rb"\g<1>1", data, count=1
        ),
        lambda data: re.sub(rb'("truncated_rows\\": )\d', rb"\g<1>9", data, count=1),
    ],
    ids=["empty", "short", "cut", "flipped", "header size", "header", "shape", "counts"],
)
def test_a_corrupt_entry_is_replaced(cached: Cached, damage: Callable[[bytes], bytes]) -> None:
    plain = cached.encode()
    (entry,) = cached.entries
    broken = entry.with_suffix(".broken")
    broken.write_bytes(damage(entry.read_bytes()))
    broken.rename(entry)  # ``plain`` still maps the whole one
    cached.said.clear()
    assert_equal(cached.encode(), plain)
    assert cached.said[0].startswith(f"{entry}: the cache entry is corrupt (")
    assert cached.hit()


def test_an_entry_that_another_process_wrote_meanwhile_is_kept(cached: Cached) -> None:
    """The other process, perhaps on another host, is reading it."""
    found = []

    def slow(row: Any) -> TextExample:
        if not found:
            cached.encode()
            found.append(cached.entries[0].stat().st_ino)
        return example(row)

    late = cached.encode(to_example=slow)
    assert [entry.stat().st_ino for entry in cached.entries] == found
    assert_equal(late, cached.encode())


def test_an_entry_may_be_deleted_while_in_use(cached: Cached) -> None:
    cached.encode()
    found = cached.encode()
    cached.entries[0].unlink()
    assert_equal(found, cached.encode())


def test_an_unwritable_cache_is_reported_once(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    kept = EncodedCache("key", said.append, directory=tmp_path / "file" / "tokens")
    kept.read = lambda split: None  # type: ignore[method-assign]
    plain = encode_split(split_of(), example, tokenizer, 15)
    for _ in range(2):
        assert_equal(encode_split(split_of(), example, tokenizer, 15, cache=kept), plain)
    assert [text for text in said if "cannot write" in text] == [
        f"cannot write to the cache {tmp_path}/file/tokens (Not a directory): the next run "
        "tokenizes again; hint: set LORAKIT_CACHE to another directory"
    ]


def test_a_full_disk_is_a_one_line_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MANY_ROWS", 1000)

    def full() -> Any:
        return Path("/dev/full").open("wb", buffering=0)

    monkeypatch.setattr(cache, "scratch_file", full)
    for processes in (1, 2):
        monkeypatch.setattr(shards, "process_count", lambda rows, n=processes: n)
        expected = r"^the tokens: cannot write to the disk of .*No space left.*LORAKIT_CACHE"
        with pytest.raises(DataError, match=expected):
            encode_split(split_of(), example, tokenizer, 15)


def test_a_killed_writer_leaves_no_entry(
    cached: Cached, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer is killed before the rename; the next one cleans up."""

    def stuck(parts: Any, file: Any) -> None:
        write_arrays(parts, file)
        time.sleep(60)

    monkeypatch.setattr(cache, "write_arrays", stuck)
    process = multiprocessing.get_context("fork").Process(target=cached.encode)
    process.start()
    deadline = time.monotonic() + 30
    while not cached.entries and time.monotonic() < deadline:
        time.sleep(0.01)
    monkeypatch.undo()
    (left,) = cached.entries
    assert left.suffix == ".new"
    assert not cached.hit()
    assert left in cached.entries, "its writer lives"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not cached.hit(max_length=16)
    assert [entry.suffix for entry in cached.entries] == [".safetensors"] * 2
    assert cached.hit()


def test_an_entry_is_a_safetensors_file(cached: Cached) -> None:
    from safetensors.numpy import load_file

    encoded = cached.encode()
    found = load_file(cached.entries[0])
    assert sorted(found) == ["input_ids", "lengths", "loss_mask", "origins"]
    np.testing.assert_array_equal(found["input_ids"], encoded.input_ids)
