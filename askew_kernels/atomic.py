"""Whole files: a reader, or a crash, finds the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import IO


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
        if not (stat.S_ISREG(old.st_mode) or stat.S_ISDIR(old.st_mode)):
            raise OSError(errno.EINVAL, "not a regular file", target)
        os.close(os.open(target, os.O_WRONLY))  # IsADirectoryError, PermissionError
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


@contextlib.contextmanager
def new_path(path: str | os.PathLike, overwrite: bool = False) -> Iterator[str]:
    """A name beside ``path`` for a file or a folder that the block makes, and that takes the place of ``path`` when the
    block ends well: for libraries that write by name, and for folders. Whatever ends it early leaves ``path`` as it
    was, and nothing else.

    What takes the place of something keeps its mode, and its owner where the system allows that; a folder is replaced
    as a whole, and each file in it keeps that of the one it replaces (no reader finds half of one, but for an instant
    none); so is a file by a folder.

    Raises FileExistsError before the block where ``path`` is there and ``overwrite`` is not set. OSError where the
    block made nothing.
    """
    target = os.path.realpath(os.fspath(path))
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(errno.EEXIST, "is there already", os.fspath(path))
    temporary, old = (os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp") for _ in range(2))
    try:
        yield temporary
        for made in reversed([*_all_in(temporary)]):  # folders after what is in them: their mode may forbid to look
            if os.path.isfile(made):
                _synchronise(made)
            _take_over(target + made[len(temporary) :], made)
        if os.path.isdir(target) or (os.path.isdir(temporary) and os.path.lexists(target)):  # which no rename replaces
            os.rename(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, target)
            raise
    except OSError as error:
        if error.filename is not None and str(error.filename).startswith(temporary):  # a name that nobody knows
            error.filename = target + str(error.filename)[len(temporary) :]
        raise
    finally:
        for rest in (temporary, old):
            if os.path.isdir(rest):
                shutil.rmtree(rest, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(rest)


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
