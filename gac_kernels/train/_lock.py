"""One run an output directory: a lock that the operating system drops with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

LOCK_FILE = ".lock"


def is_first_rank() -> bool:
    """Whether this process is the one of its run that writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


class OutputLock:
    """Holds `output/.lock` as long as it is open. A killed process leaves the file and not the lock.

    Where the lock is another's, or cannot be had, that is said by :meth:`check` and not at once: under several ranks
    the others must hear of it. On a network disk the lock reaches as far as the disk's own locks do; where it has none
    a RuntimeWarning says that nothing keeps a second run out.

    Args:
        output: the run's directory; made if need be, and removed again if nothing but the lock was put there.
        wanted: whether this process is the one that writes. Otherwise nothing is done.
    """

    def __init__(self, output: Path, *, wanted: bool = True) -> None:
        self.path = Path(output) / LOCK_FILE
        self._descriptor: int | None = None
        self._error: Exception | None = None
        self._made = wanted and not self.path.parent.exists()
        if wanted:
            try:
                self._take()
            except (OSError, ValueError) as error:
                self._error = error

    def check(self) -> None:
        """Raise what kept the lock from being taken: ValueError naming the holder, or OSError."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Let go of the lock. Further calls do nothing."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        if self._made and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self.path, flags, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                current = os.stat(self.path).st_ino == os.fstat(descriptor).st_ino
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise ValueError(
                    f"output: {self.path.parent} is in use by another run ({holder or 'one that has just begun'}); "
                    "wait for it, or name another directory"
                ) from None
            except FileNotFoundError:
                current = False
            except OSError as error:
                warnings.warn(
                    f"{self.path}: this disk has no locks ({error.strerror}): see that no second run writes there",
                    RuntimeWarning,
                    stacklevel=3,
                )
                current = True
            if current:
                break
            os.close(descriptor)  # its holder removed the file between our opening and our locking it
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        self._descriptor = descriptor
