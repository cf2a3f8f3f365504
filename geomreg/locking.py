"""A file that one process at a time has."""

import errno
import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock"]

_HELD: set[str] = set()  # by this process, to which the system would give them once more


class Lock:
    """Held until :meth:`release` or the end of the process, whatever the end is.

    It belongs to the process and not, as that of ``flock`` would, also to the processes that load its data: those survive a kill of
    their parent for some seconds, and would keep the next command out. Where the file system has no locks, everybody gets one.
    """

    def __init__(self, stream: IO[str], key: str, *, held: bool) -> None:
        self._stream, self._key, self._process = stream, key, os.getpid()
        self.held = held  # False: there are no locks, and others have it too

    @classmethod
    def take(cls, file: Path) -> "Lock | None":
        """The lock, or None if another process, or another part of this one, has it.

        Args:
            file: is made if it is not there.

        Raises:
            OSError: it cannot be written.
        """
        key = os.path.realpath(file)
        if key in _HELD:
            return None  # before it is opened: closing it again would end the lock
        stream, held = open(file, "w", encoding="ascii"), fcntl is not None  # noqa: SIM115
        try:
            if fcntl is not None:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.fstat(stream.fileno()).st_ino == file.stat().st_ino  # not removed by one that has just finished
        except FileNotFoundError:
            there = False
        except OSError as error:  # other kinds: a file system without locks
            there, held = error.errno not in (errno.EAGAIN, errno.EACCES), False
        if not there:
            stream.close()
            return None
        _HELD.add(key)
        return cls(stream, key, held=held)

    def release(self, *, remove: bool = False) -> None:
        """Let others have it; with ``remove`` the file goes too."""
        if os.getpid() != self._process:  # a fork, which never had it
            return
        if remove:
            Path(self._key).unlink(missing_ok=True)
        _HELD.discard(self._key)
        self._stream.close()
