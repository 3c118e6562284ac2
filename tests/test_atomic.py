"""Contract: ``atomic.replacing`` writes a file whole or leaves the old one, under the mode, the link and the name that
a plain ``open(path, "wb")`` would have given it, and leaves no other file, whoever else writes at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from askew_kernels import atomic


def write(path, data=b"new"):
    with atomic.replacing(path) as file:
        file.write(data)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    return path


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_new_file_has_the_mode_of_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
        (tmp_path / "plain").write_bytes(b"")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == mode(tmp_path / "plain") == 0o666 & ~umask


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o666, 0o755])
def test_an_old_file_keeps_its_mode_and_its_owner(bits, old):
    os.chmod(old, bits)
    if os.geteuid() == 0:
        os.chown(old, 12345, 23456)
    before = os.stat(old)
    with atomic.replacing(old) as file:
        assert mode(file.name) == bits  # from the start: nobody reads what he may not
        file.write(b"new")
    after = os.stat(old)
    assert (mode(old), after.st_uid, after.st_gid) == (bits, before.st_uid, before.st_gid)
    assert old.read_bytes() == b"new"


def test_links_stay_and_their_target_is_written(tmp_path):
    (tmp_path / "volume").mkdir()
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(tmp_path / "volume" / "file")
    for data in (b"one", b"two"):  # the target is not there at first
        write(tmp_path / "first", data)
        assert (tmp_path / "volume" / "file").read_bytes() == data
        assert (tmp_path / "first").is_symlink() and (tmp_path / "second").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["first", "second", "volume"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, os.fsdecode(b"caf\xe9"), " ", "-", "a\nb"])
def test_every_name_that_the_system_takes(name, tmp_path):
    for path in (tmp_path / name, os.fsencode(tmp_path / name), str(tmp_path / name)):
        write(path, os.fsencode(path))
        assert (tmp_path / name).read_bytes() == os.fsencode(path)
    assert os.listdir(tmp_path) == [name]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("here")
    assert os.listdir(tmp_path) == ["here"]


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, Stop])
def test_an_early_end_leaves_the_old_file_alone(error, old):
    with pytest.raises(error), atomic.replacing(old) as file:
        file.write(b"half")
        file.flush()
        raise error
    with pytest.raises(error), atomic.replacing(old.with_name("another")):
        raise error
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["old"]


def made(path, kind, text):
    """A file, or a folder with one and a folder with another."""
    if kind == "file":
        Path(path).write_text(text)
    else:
        os.makedirs(os.path.join(path, "inner"))
        for name in ("one", "inner/two"):
            Path(path, name).write_text(text)


def names_and_texts(path):
    files = [Path(path)] if os.path.isfile(path) else sorted(p for p in Path(path).rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_text() for p in files}


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_new_path_takes_the_place_of_files_and_folders(there, new, tmp_path, monkeypatch):
    path, other = tmp_path / "path", tmp_path / "other"
    made(path, there, "old")
    made(other, new, "new")
    before = names_and_texts(path)
    with pytest.raises(FileExistsError), atomic.new_path(path):
        pass
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"), atomic.new_path(path, overwrite=True) as name:
            made(name, new, "new")
    assert names_and_texts(path) == before and sorted(os.listdir(tmp_path)) == ["other", "path"]
    with atomic.new_path(path, overwrite=True) as name:
        made(name, new, "new")
    assert names_and_texts(path) == names_and_texts(other) and sorted(os.listdir(tmp_path)) == ["other", "path"]


@pytest.mark.parametrize("name", ["", "path/", "missing/../path", "link", "folder/../path", "folder/."])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_no_spelling_of_a_name_replaces_what_is_there_unasked(name, new, tmp_path, monkeypatch):
    home = tmp_path / "home"
    made(home / "folder", "folder", "old")
    made(home / "path", "file", "old")
    os.symlink("not there yet", home / "link")
    monkeypatch.chdir(home)
    before = names_and_texts(home)
    for overwrite in (False, True) if name == "" else (False,):  # which names nothing
        with pytest.raises(OSError), atomic.new_path(name, overwrite) as beside:
            made(beside, new, "new")
        with pytest.raises(OSError):
            atomic.check_new(name, overwrite)
    assert names_and_texts(home) == before and os.listdir(tmp_path) == ["home"]
    assert sorted(os.listdir(home)) == ["folder", "link", "path"]


@pytest.mark.parametrize("call", ["rename", "replace"])
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("there", ["file", "folder"])
def test_an_interrupt_while_names_change_loses_nothing(there, new, call, tmp_path, monkeypatch):
    """It comes when the system has done what it was asked: the old or the new one is there, whole, and nothing else."""
    path, other = tmp_path / "path", tmp_path / "other"
    made(path, there, "old")
    made(other, new, "new")
    whole = [names_and_texts(path), names_and_texts(other)]
    real, calls = getattr(os, call), []

    def interrupted(*names):
        real(*names)
        if not calls:
            calls.append(names)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupted)
    with contextlib.suppress(KeyboardInterrupt), atomic.new_path(path, overwrite=True) as name:
        made(name, new, "new")
    assert names_and_texts(path) in whole and sorted(os.listdir(tmp_path)) == ["other", "path"]


def test_a_folder_that_another_put_there_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "path"
    made(path, "folder", "old")
    real = os.replace

    def late(*names):
        made(path, "folder", "theirs")
        real(*names)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(OSError), atomic.new_path(path, overwrite=True) as name:
        made(name, "folder", "new")
    assert set(names_and_texts(path).values()) == {"theirs"} and os.listdir(tmp_path) == ["path"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_new_path_has_the_mode_of_what_it_replaces(kind, tmp_path):
    path = tmp_path / "path"
    made(path, kind, "old")
    for each in [path, *path.rglob("*")]:
        os.chmod(each, 0o700 if each.is_dir() else 0o600)
    with atomic.new_path(path, overwrite=True) as name:
        made(name, kind, "new")
    assert {stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")] if p.is_file()} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")] if p.is_dir()} <= {0o700}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_system_call_leaves_the_old_file_alone(call, old, monkeypatch):
    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no"):
        write(old)
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["old"]


def test_a_full_disk_leaves_the_old_file_alone(old):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(old, bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["old"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder")
    with pytest.raises(OSError, match="not a regular file"):
        write(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="nowhere/file"):  # its own name, not that of the temporary
        write(tmp_path / "nowhere" / "file")
    with pytest.raises(TypeError):
        write(3.0)
    with pytest.raises(OSError, match="not a regular file"):
        atomic.check_new(tmp_path / "pipe", overwrite=True)
    with pytest.raises(OSError, match="not a regular file"), atomic.new_path(tmp_path / "pipe", overwrite=True) as name:
        Path(name).write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@pytest.mark.parametrize("name", [".", "..", "../here", "../here/."])
def test_the_current_folder_is_not_replaced(name, tmp_path, monkeypatch):
    """`--out . --overwrite` would delete what else lies there."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "theirs").write_text("theirs")
    monkeypatch.chdir(here)
    with pytest.raises(OSError, match="the current folder"), atomic.new_path(name, overwrite=True) as new:
        os.mkdir(new)
    assert (here / "theirs").read_text() == "theirs" and sorted(os.listdir(tmp_path)) == ["here"]


def test_a_file_that_may_not_be_written_is_not_replaced(old, monkeypatch):
    old.chmod(0o444)
    if os.geteuid() == 0:  # who may write everything

        def open_as_others(path, flags, *rest, real=os.open):
            if path == str(old) and not os.stat(path).st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", open_as_others)
    with pytest.raises(PermissionError):
        write(old)
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["old"]


def test_threads_and_one_name(tmp_path):
    path, failures = tmp_path / "last", []

    def writer(letter):
        for _ in range(40):
            try:
                write(path, letter * 50_000)
                if len(set(path.read_bytes())) != 1:
                    failures.append("mixed")
            except OSError as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and os.listdir(tmp_path) == ["last"] and len(path.read_bytes()) == 50_000
