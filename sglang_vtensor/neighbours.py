"""Servers that share a device: what each holds and lacks, and who gives how much to whom.

Each server has one file in a folder of its user in shared memory, writes only its own, and reads those of the others.
There is no lock between them: a server holds an exclusive `flock` on its file for as long as it lives, so a file on
which somebody else gets one belongs to a dead server, however it died.

    /dev/shm/sglang-vtensor-<uid>/          mode 0700
        <device>.<32 random hex digits>     mode 0600: MAGIC, VERSION, a count, and the fields of `Record`, int64 each

A file has a name that no other process can have: containers that share the folder count their processes from 1, each
of them. It is removed by its owner, or by whoever holds its lock after that died. If anybody else removes it, as
systemd does with a user's shared memory when that user logs out, its owner makes another one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import stat
import struct
import time
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

logger = logging.getLogger(__name__)

MAGIC, VERSION = 0x76_74_65_6E_73_6F_72, 2
#: The folder is listed so often; known files are read whenever asked.
LIST_SECONDS = 1.0
#: Who has told nothing for so long stands still, in a long batch or for good: it holds what it holds, gives nothing,
#: and is given nothing.
STALE_SECONDS = 2.0
#: The same of who has no KV cache yet: a server that reads weights may not come to tell anything meanwhile.
ARRIVING_SECONDS = 60.0
#: A file that nobody has locked yet is being made by its owner, unless it is so old.
MAKING_SECONDS = 60.0
#: Why a file cannot be opened now, whatever file it is.
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class NoNeighbours(RuntimeError):
    """The shared folder cannot be used. The message says why, and what to do."""


@dataclass(frozen=True)
class Record:
    """What a server tells of itself, in bytes of device memory.

    `backed`: the memory that its KV cache holds. `idle`: the part of it that nobody uses. `cached`: the part that it
    could evict. `minimum`: it gives nothing away below this. `wanted`: memory that it lacks, and for which its requests
    wait. `alone`: what it must hold to come up at all, or for the one request to end that comes first there, as nothing
    runs, or only that; else 0. `since`: when that began to wait so, in microseconds of the machine's monotonic clock.
    `headroom`: what it needs free on the device beside its KV cache.
    """

    backed: int = 0
    idle: int = 0
    cached: int = 0
    minimum: int = 0
    wanted: int = 0
    alone: int = 0
    since: int = 0
    headroom: int = 0

    @property
    def least(self) -> int:
        """What it does not give away, whoever wants it: what is live, and its minimum."""
        return max(self.backed - self.idle - self.cached, min(self.minimum, self.backed))


#: No device has so much: what a file tells may be anything.
_MOST = 1 << 60
#: MAGIC, VERSION, and how often the record was told.
_HEAD = "<3q"
_RECORD = f"<{len(fields(Record))}q"
_AT = struct.calcsize(_HEAD)
_SIZE = _AT + struct.calcsize(_RECORD)


def default_folder() -> Path:
    return Path("/dev/shm") / f"sglang-vtensor-{os.getuid()}"


class Neighbours:
    """This server's place among those on one device. `device` names it in all processes alike, such as its UUID.

    Raises `NoNeighbours` if the folder is somebody else's, or cannot be made.
    """

    def __init__(self, device: str, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self._device = re.sub(r"[^A-Za-z0-9-]", "-", device)
        self._others: dict[str, int] = {}  # descriptors of their files, by name
        #: How often each of them had told something when that was seen to have grown, and when that was.
        self._heard: dict[str, tuple[int, float]] = {}
        self._warned: set[str] = set()
        self._listed_at = -LIST_SECONDS
        self._record, self._told = Record(), 0
        self._path, self._file = self._create()
        os.register_at_fork(after_in_child=functools.partial(_leave_to_parent, weakref.ref(self)))
        self._remove_what_the_dead_left()

    def _create(self) -> tuple[Path, int]:
        _check_folder(self.folder)
        path = self.folder / f"{self._device}.{secrets.token_hex(16)}"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoNeighbours(f"cannot make {path}: {error}") from error
        try:
            # Locked before it has a size: a file without one is not looked at. One who looks holds it for a moment.
            fcntl.flock(file, fcntl.LOCK_EX)
            self._write(file)  # an error here, where the folder's file system is full, and not later
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(file)
            raise NoNeighbours(f"cannot make {path}: {error}") from error
        return path, file

    def tell(self, record: Record) -> None:
        """Write this server's record, for the others to read."""
        self._record = record
        self._told += 1
        try:
            self._write(self._file)
        except OSError as error:  # somebody cut the file off, and there is no memory for it
            self._warn_once(
                "told", "other servers on this device are told nothing: cannot write %s: %s", self._path, error
            )

    def _write(self, file: int) -> None:
        os.pwrite(file, struct.pack(f"<{_SIZE // 8}q", MAGIC, VERSION, self._told, *astuple(self._record)), 0)

    def others(self) -> list[Record]:
        """What the living others on this device tell."""
        now = time.monotonic()
        if now - self._listed_at >= LIST_SECONDS:
            self._listed_at = now
            self._list()
        records = []
        for name, file in self._others.items():
            data = os.pread(file, _SIZE, 0)
            if len(data) < _SIZE:
                continue  # somebody cut it off: it tells nothing until its owner writes again
            count, record = struct.unpack_from("<q", data, 16)[0], Record(*struct.unpack_from(_RECORD, data, _AT))
            heard, at = self._heard.get(name, (-1, now))
            if count != heard:
                self._heard[name] = count, now
            elif now - at > (STALE_SECONDS if record.backed else ARRIVING_SECONDS):
                record = replace(record, wanted=0, alone=0, minimum=record.backed)
            records.append(record)
        return records

    def _list(self) -> None:
        """Look who is there, and remove what the dead have left."""
        self._see_that_mine_is_there()
        found: dict[str, int] = {}
        try:
            for path in self._files(f"{self._device}."):
                file = self._look(path)
                if file is not None:
                    found[path.name] = file
        except OSError as error:
            self._warn_once("files", "cannot look for other servers on this device; known ones still count: %s", error)
            found = self._others | found
        for name in set(self._others) - set(found):
            os.close(self._others[name])
            self._heard.pop(name, None)
        self._others = found

    def _files(self, prefix: str = "") -> list[Path]:
        """The files of others whose names begin with `prefix`. Raises `OSError` if the folder cannot be read now."""
        try:
            return [path for path in self.folder.iterdir() if path != self._path and path.name.startswith(prefix)]
        except (FileNotFoundError, NotADirectoryError):
            return []  # somebody removed the folder: `_see_that_mine_is_there` makes it again, or says why not

    def _see_that_mine_is_there(self) -> None:
        """Make my file again if somebody removed it: without it the others do not know of this server."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.lstat(), os.fstat(self._file)):
                return
        try:
            path, file = self._create()
        except NoNeighbours as error:
            self._warn_once(
                "removed",
                "%s was removed, and other servers on this device do not know of this one until it is there again: %s",
                self._path,
                error,
            )
            return
        os.close(self._file)
        self._path, self._file = path, file

    def _remove_what_the_dead_left(self) -> None:
        """Once, and whatever device they were on: nobody may ever come to theirs again."""
        with contextlib.suppress(OSError):
            for path in self._files():
                opened = _open_living(path)
                if opened is not None:
                    os.close(opened)

    def _look(self, path: Path) -> int | None:
        """The descriptor of a living server's file; None for what is none. Raises `OSError` if no file can be opened
        now."""
        file = _open_living(path)
        if file is None:
            return None
        if path.name in self._others:
            os.close(file)
            return self._others[path.name]
        header = os.pread(file, 16, 0)
        magic, version = struct.unpack("<2q", header) if len(header) == 16 else (0, 0)
        if (magic, version) == (MAGIC, VERSION):
            return file
        os.close(file)
        if magic:  # else it is being made
            self._warn_once(
                path.name,
                "another server on this device tells of itself in version %d, this one in %d: they do not share "
                "memory with each other; run the same sglang-vtensor in both",
                version,
                VERSION,
            )
        return None

    def _warn_once(self, of: str, message: str, *args: object) -> None:
        if of not in self._warned:
            self._warned.add(of)
            logger.warning(message, *args)

    def close(self) -> None:
        """Leave: remove this server's file. The others notice at their next look. A child that was forked has none."""
        if self._file < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        for file in self._others.values():
            os.close(file)
        self._others = {}
        os.close(self._file)
        self._file = -1


def _leave_to_parent(server: weakref.ref[Neighbours]) -> None:
    """In a child that was forked: close the file, whose lock would else outlive the parent."""
    mine = server()
    if mine is not None and mine._file >= 0:
        os.close(mine._file)
        mine._file = -1


def _open_living(path: Path) -> int | None:
    """Open the file of a living server. None for any other: what a dead one left is removed. Raises `OSError` if no
    file can be opened now."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in NO_MORE_FILES:
            raise
        return None  # it ended just now, or is no file of a server's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file
    # Nobody else holds it: its server is dead, or is making it right now, which a size of zero tells. It is removed
    # while this process has the lock, so that of two who look one removes it, and no name is ever used again.
    if os.fstat(file).st_size or _age(file) > MAKING_SECONDS:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    os.close(file)
    return None


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise NoNeighbours(f"cannot make {folder}: {error}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NoNeighbours(
            f"{folder} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: a folder of user "
            f"{os.getuid()} with mode 700 wanted; remove it"
        )


def _age(file: int) -> float:
    return time.time() - os.fstat(file).st_mtime


def allowed(mine: Record, others: Sequence[Record], free: int) -> int | None:
    """How many bytes the server of `mine` may hold so that the others get what they want; None: whatever it likes.
    `free` is what the device has left for all of them.

    Who wants nothing gives what is idle first, each in proportion to what it has idle; then what is cached, likewise,
    down to its minimum. What these give, what is free, and what they hold themselves, those share that want something
    (`_shares`). What is free, and more than all want, is anybody's.

    Where that is not enough for whose turn it is (`_first`), the others keep what is live, also who wants nothing, and
    begin nothing until it is enough.
    """
    if not any(other.wanted for other in others):
        return None
    everybody = [mine, *others]
    givers = [one for one in everybody if not one.wanted]
    takers = [one for one in everybody if one.wanted]
    wanted = sum(taker.wanted for taker in takers) - free
    idle = [min(giver.idle, max(0, giver.backed - giver.minimum)) for giver in givers]
    cached = [
        min(giver.cached, max(0, giver.backed - spare - giver.minimum))
        for giver, spare in zip(givers, idle, strict=True)
    ]
    from_idle = min(max(0, wanted), sum(idle))
    from_cached = min(max(0, wanted - from_idle), sum(cached))
    there = free + sum(taker.backed for taker in takers) + from_idle + from_cached
    first = _first(everybody, free + sum(one.backed for one in everybody))
    if first is not None:
        turn = everybody[first]
        # Requests that begin elsewhere would take what others leave as they end, and it might never be enough.
        if turn.alone > there - sum(one.least for one in takers if one is not turn):
            return max(turn.alone, mine.least) if first == 0 else mine.least
    if mine.wanted:
        return _shares(takers, there)[0]
    if wanted <= 0:
        return mine.backed - wanted
    return mine.backed - _portion(from_idle, idle[0], sum(idle)) - _portion(from_cached, cached[0], sum(cached))


def _first(sharers: Sequence[Record], there: int) -> int | None:
    """Whose turn it is, by number, of those that share `there`: the one that has waited longest of those that want
    something. Who can never have so much, beside the minimums of the others, has no turn: they would wait for ever with
    it."""
    kept = [min(one.minimum, one.backed) for one in sharers]
    able = [n for n, one in enumerate(sharers) if one.wanted and 0 < one.alone <= there - sum(kept) + kept[n]]
    return min(able, key=lambda n: (sharers[n].since, sharers[n].alone, astuple(sharers[n])), default=None)


def _shares(takers: Sequence[Record], there: int) -> list[int]:
    """What each may hold of `there`, which all of them want more of: equal shares, but for who needs less than one, and
    for what nobody gives away. Where there is enough for all, each may have what the others leave.

    A server whose next request needs more than its share, and which runs nothing, would wait for ever, and so might two
    for each other. So there is room for the request that has waited longest, until it ends; the others run what they
    have to its end, and begin no more before that one does.
    """
    low = [taker.least for taker in takers]
    high = [max(taker.backed + taker.wanted, least) for taker, least in zip(takers, low, strict=True)]
    left = there - sum(high)
    if left >= 0:
        return [most + left for most in high]
    first = _first(takers, there)
    if first is not None:
        low[first] = max(low[first], takers[first].alone)
        high[first] = max(high[first], low[first])

    def held(share: int) -> list[int]:
        return [min(max(share, least), most) for least, most in zip(low, high, strict=True)]

    # The largest equal share that there is enough for.
    share = bisect_right(range(min(there, _MOST) + 1), there, key=lambda share: sum(held(share))) - 1
    return held(max(0, share))


def _portion(amount: int, mine: int, of_all: int) -> int:
    """My part of an amount, in proportion, rounded up."""
    return -(-amount * mine // of_all) if of_all else 0
