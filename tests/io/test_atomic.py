"""Atomic writes: files and directories are either complete or unchanged."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lorakit.io.atomic import (
    atomic_directory,
    atomic_file,
    remove_leftovers,
    remove_path,
    write_text,
)


def content(folder: Path) -> dict[str, str]:
    """Return the text of every file below ``folder`` by relative name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def _write_and_wait(folder: Path, kind: str, ready: Connection) -> None:
    if kind == "file":
        with atomic_file(folder / "out") as new:
            new.write_text("half")
            ready.send(True)
            signal.pause()
    else:
        with atomic_directory(folder / "out", replace=True) as new:
            (new / "a").write_text("half")
            ready.send(True)
            signal.pause()


def _write_often(folder: Path, kind: str, letter: str, ended: Connection) -> None:
    try:
        for _ in range(150):
            if kind == "file":
                write_text(folder / "out", letter * 10)
            else:
                with atomic_directory(folder / "out", replace=True) as new:
                    (new / "a").write_text(letter)
                    (new / "b").write_text(letter)
        ended.send("")
    except Exception as error:
        ended.send(repr(error))


def test_text_replaces_the_file(tmp_path: Path) -> None:
    for text in ("first\n", "second\nÄ\n"):
        write_text(tmp_path / "out", text)
        assert (tmp_path / "out").read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_text(tmp_path / "out", "text")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_of_another_writer_is_kept_on_request(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_file(tmp_path / "out", replace=False) as new:
            new.write_text(text)
    assert content(tmp_path) == {"out": "first"}


def test_an_error_leaves_the_file_unchanged(tmp_path: Path) -> None:
    write_text(tmp_path / "out", "before")
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path / "out") as new:
        new.write_text("half" + tmp_path.read_text())
    assert content(tmp_path) == {"out": "before"}


@pytest.mark.parametrize("replace", [False, True])
def test_a_directory_appears_complete(replace: bool, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out", replace=replace) as new:
        (new / "sub").mkdir()
        (new / "sub" / "a").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert content(tmp_path) == {"deep/out/sub/a": "new"}


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("before")
    with pytest.raises(FileExistsError), atomic_directory(out, replace=False) as new:
        (new / "b").write_text("after")
    assert content(tmp_path) == {"out/a": "before"}
    with atomic_directory(out, replace=True) as new:
        (new / "b").write_text("after")
    assert content(tmp_path) == {"out/b": "after"}


def test_an_error_leaves_the_directory_unchanged(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("before")
    with pytest.raises(IsADirectoryError), atomic_directory(tmp_path / "out", replace=True) as new:
        (new / "a").write_text("half" + tmp_path.read_text())
    assert content(tmp_path) == {"out/a": "before"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_leftovers_of_a_killed_writer_are_deleted(kind: str, tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write_and_wait, args=(tmp_path, kind, theirs))
    process.start()
    assert ours.poll(30)
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 1, "its writer lives"
    process.kill()
    process.join()
    remove_leftovers(tmp_path, "other")
    assert len(os.listdir(tmp_path)) == 1, "another target's"
    write_text(tmp_path / "out", "whole")
    assert content(tmp_path) == {"out": "whole"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_simultaneous_writers_of_one_target(kind: str, tmp_path: Path) -> None:
    """All succeed, and the target is one writer's in full."""
    context = multiprocessing.get_context("fork")
    ended = []
    for letter in "xyz":
        ours, theirs = multiprocessing.Pipe()
        context.Process(target=_write_often, args=(tmp_path, kind, letter, theirs)).start()
        ended.append(ours)
    assert [end.recv() for end in ended] == ["", "", ""]
    (text,) = {text[0] for text in content(tmp_path).values()}
    assert text in "xyz"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_between_the_renames(replaced: bool, tmp_path: Path) -> None:
    """A directory that was moved aside is restored, unless its replacement exists."""
    out, old = tmp_path / "out", tmp_path / ".out.0123abcd.old"
    old.mkdir()
    (old / "a").write_text("before")
    if replaced:
        out.mkdir()
        (out / "a").write_text("after")
    else:
        (tmp_path / ".out.0123abcd.new").mkdir()
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {"out/a": "after" if replaced else "before"}
    assert os.listdir(tmp_path) == ["out"]


def test_other_hidden_files_are_left_alone(tmp_path: Path) -> None:
    names = [".out.new", ".out.0123abcd.txt", ".out.0123ABCD.new", "out.0123abcd.new"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_directory_is_removed_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    remove_path(tmp_path / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / ".out.0123abcd.removed").mkdir()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []
