"""Whole files: a reader, or a crash, finds the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def _check_old(found: os.stat_result, target: str) -> None:
    """OSError where what is there is not to be replaced."""
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "not a regular file", target)
    os.close(os.open(target, os.O_WRONLY))  # IsADirectoryError, PermissionError


@contextlib.contextmanager
def replacing(path: str | bytes | os.PathLike) -> Iterator[IO[bytes]]:
    """A new binary file, open for writing and reading, that takes the place of ``path`` when the block ends well.

    It is written beside the file that ``path`` names, under a short random name, so that threads and processes may
    write one path at a time; synchronised, then renamed. Symbolic links stay, and their target is replaced. A new file
    has the mode that the umask leaves, one that was there keeps its mode, and its owner where the system allows that;
    its other hard links keep the old contents. Whatever ends the block early leaves ``path`` as it was, and no other
    file.

    Raises OSError: for a file that may not be written or is none (folder, device, pipe), and where the system does.
    """
    target = os.path.realpath(os.fsdecode(path))
    old: os.stat_result | None = None
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
        _check_old(old, target)
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode)  # from the start: nobody reads more than he may
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if old is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                with contextlib.suppress(OSError):  # file systems without modes
                    os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename == temporary:  # a name that nobody knows
            error.filename = target
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write(path: str | bytes | os.PathLike, data: bytes) -> None:
    """A whole file or none (``replacing``); what is there and no file, such as /dev/stdout, is written to."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        with open(path, "wb") as stream:
            stream.write(data)
        return
    with replacing(path) as file:
        file.write(data)


def check(path: str | bytes | os.PathLike, folders: bool = False) -> None:
    """Raises the OSError that ``replacing`` would, before there is anything to write; makes nothing. folders: those
    that are missing are made by whoever writes."""
    target = os.path.realpath(os.fsdecode(path))
    try:
        found = os.stat(target)
    except FileNotFoundError:
        pass
    else:
        _check_old(found, target)
    check_folder(os.path.dirname(target), folders)


def check_folder(path: str | os.PathLike, folders: bool = False) -> None:
    """Raises OSError where files cannot be kept in a folder, or, where it may be made, in the nearest one above it that
    is there; makes nothing."""
    there = os.path.abspath(path)
    while folders:
        try:
            os.lstat(there)
            break
        except FileNotFoundError:
            there = os.path.dirname(there)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        error.filename = there  # not that of a file that nobody knows
        raise


@contextlib.contextmanager
def new_path(path: str | os.PathLike, overwrite: bool = False) -> Iterator[str]:
    """A name beside ``path`` for a file or a folder that the block makes, and that takes the place of ``path`` when the
    block ends well: for libraries that write by name, and for folders. Whatever ends it early leaves ``path`` as it
    was, and nothing else.

    What takes the place of something keeps its mode, and its owner where the system allows that; a folder is replaced
    as a whole, and each file in it keeps that of the one it replaces (no reader finds half of one, but for an instant
    none); so is a file by a folder.

    Raises OSError before the block: FileExistsError where ``path`` is there and ``overwrite`` is not set, for what is
    neither a file nor a folder (device, pipe), for an empty name, for the current folder and those that hold it; and
    where the block made nothing.
    """
    target = os.path.realpath(os.fspath(path))
    check_new(path, overwrite)
    temporary, old = (os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        yield temporary
        for made in reversed([*_all_in(temporary)]):  # folders after what is in them: their mode may forbid to look
            if os.path.isfile(made):
                _synchronise(made)
            _take_over(target + made[len(temporary) :], made)
        try:
            # which no rename replaces
            if os.path.isdir(target) or (os.path.isdir(temporary) and os.path.lexists(target)):
                os.rename(target, old)
            os.replace(temporary, target)
        except BaseException:  # an interrupt, too, which comes when either of them is done
            if os.path.lexists(old) and not os.path.lexists(target):
                os.rename(old, target)
            raise
    except OSError as error:
        if error.filename is not None and str(error.filename).startswith(temporary):  # a name that nobody knows
            error.filename = target + str(error.filename)[len(temporary) :]
        raise
    finally:
        for rest in (temporary, old) if os.path.lexists(target) else (temporary,):
            if os.path.isdir(rest):
                shutil.rmtree(rest, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(rest)


def check_new(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises the OSError that ``new_path`` would, before there is anything to write."""
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "expected a name, got none", "")
    target = os.path.realpath(os.fspath(path))  # which is there for some names that are not: "file/", "missing/../file"
    if not overwrite and (os.path.lexists(path) or os.path.lexists(target)):
        raise FileExistsError(errno.EEXIST, "is there already", os.fspath(path))
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        raise OSError(errno.EINVAL, "not a regular file and no folder", target)
    if os.path.isdir(target) and Path(os.path.realpath(os.curdir)).is_relative_to(target):
        raise OSError(errno.EBUSY, "is or holds the current folder, which is not replaced", target)
    check_folder(os.path.dirname(target))


def _all_in(path: str) -> Iterator[str]:
    """The file, or the folder and all that is in it."""
    yield path
    for folder, folders, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in [*folders, *names])


def _take_over(old: str, new: str) -> None:
    """Gives ``new`` the owner and the mode of ``old``, if that is there and both are files, or both folders."""
    if os.path.isdir(old) != os.path.isdir(new):
        return
    with contextlib.suppress(OSError):  # also file systems without modes
        found = os.stat(old)
        if hasattr(os, "chown"):
            with contextlib.suppress(OSError):
                os.chown(new, found.st_uid, found.st_gid)
        os.chmod(new, stat.S_IMODE(found.st_mode))


def _synchronise(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
