"""Saves checkpoints without holding up training, and resumes from the newest whole one.

`Checkpointer` is the run's interface. `save` carries out one save from snapshot to commit, in a background
thread or in the training thread itself.
"""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.checkpoint.agreement import from_first, is_first, on_all, rank_and_size
from tide_mega.checkpoint.contents import Contents, Stored, read, write
from tide_mega.checkpoint.folder import CheckpointFolder, keep_mark, newest_valid, verify
from tide_mega.checkpoint.state import Identity, SavedState, TrainingState, check_model
from tide_mega.checkpoint.storage import MANIFEST_FILE, STATE_FILE, BoxWriter, FileRecord, Manifest
from tide_mega.config.schema import CheckpointConfig, ModelConfig
from tide_mega.errors import CheckpointError
from tide_mega.files import to_disk
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import make_host_group

log = logging.getLogger(__name__)

LAST_SAVE_SECONDS = 120.0
"""Time that a run ending with an error waits for a running save."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept."""

    last: int
    every: int | None = None
    """Steps; checkpoints at its multiples are kept forever."""


@dataclass(frozen=True)
class Destinations:
    """Where checkpoints go."""

    local: CheckpointFolder
    keep: Keep
    remote: CheckpointFolder | None
    remote_keep: Keep
    in_use: Callable[[], Collection[int]] = tuple
    """Returns steps whose local checkpoints are being read, and must not be removed yet."""


@dataclass(frozen=True)
class Written:
    """The result of a save."""

    size: int
    """Total bytes of all files."""
    seconds: float


class Savable(Protocol):
    """What a process has to save."""

    def check(self) -> None:
        """Raise the error that kept this process from taking part, if any."""

    def boxes(self) -> list[Stored]:
        """Return this process's boxes; collective."""


def save(
    snapshot: Savable,
    state: SavedState,
    to: Destinations,
    group: ProcessGroup | None,
    *,
    disk_is_full: bool = False,
) -> Written:
    """Write, commit, copy to the remote folder, remove old ones; collective over `group`, alone if it is None.

    `disk_is_full` is an injected fault: this rank's file cannot be written completely.

    Raises:
        CheckpointError: it failed on some rank; raised on every rank. The incomplete checkpoint has been removed,
            unless the message says that it is whole in the local folder.
    """
    start, step = time.monotonic(), state.progress.step
    on_all(group, snapshot.check)
    boxes = snapshot.boxes()
    writer = BoxWriter(
        to.local.partial(step),
        state.save_id,
        prepare=lambda: to.local.prepare(step),
        commit=lambda files: to.local.commit(step, state.save_id, state.dump(), files),
        disk_is_full=disk_is_full,
    )
    try:
        write(boxes, writer, group)
    except CheckpointError as error:
        if is_first(group):
            to.local.discard(step)
        raise CheckpointError(f"the checkpoint of step {step} {error}") from error

    def conclude() -> Manifest:
        to.local.retain(to.keep.last, to.keep.every, step, to.in_use())
        return Manifest.read(to.local.final(step))

    manifest = from_first(group, conclude)
    if to.remote is not None:
        _copy(step, manifest, to, to.remote, group)
    size = sum(record.size for record in manifest.files.values())
    return Written(size, time.monotonic() - start)


def _copy(
    step: int,
    manifest: Manifest,
    to: Destinations,
    remote: CheckpointFolder,
    group: ProcessGroup | None,
) -> None:
    """Copy a finished checkpoint, each rank some of its files; the manifest is copied last."""
    rank, size = rank_and_size(group)
    source, target = to.local.final(step), remote.partial(step)
    names = sorted(name for name in manifest.files if name != STATE_FILE)

    def prepare() -> None:
        if is_first(group):
            remote.prepare(step)

    def look() -> None:
        if is_first(group):
            keep_mark(to.local.path.parent, remote.path)

    def copy() -> None:
        for name in names[rank::size]:
            _copy_file(source / name, target / name, manifest.files[name])

    def commit() -> None:
        if is_first(group):
            state = (source / STATE_FILE).read_text(encoding="utf-8")
            remote.commit(step, manifest.save_id, state, {name: manifest.files[name] for name in names})
            remote.retain(to.remote_keep.last, to.remote_keep.every, step)

    is_ours = False
    try:
        on_all(group, look)
        is_ours = True
        for part in (prepare, copy, commit):
            on_all(group, part)
    except CheckpointError as error:
        if is_ours and is_first(group):
            remote.discard(step)
        raise CheckpointError(
            f"the checkpoint of step {step} is whole in {source}, but could not be copied to {remote.path} "
            f"({error})"
        ) from error


def _copy_file(source: Path, target: Path, record: FileRecord) -> None:
    shutil.copyfile(source, target)
    to_disk(target)
    if FileRecord.of(target) != record:
        raise CheckpointError(f"{target} is not what {source.parent / MANIFEST_FILE} says")


@dataclass
class Pending:
    """A running save."""

    step: int
    thread: threading.Thread | None = None
    written: Written | None = None
    error: Exception | None = None

    def run(self, work: Callable[[], Written]) -> None:
        """Do the work and keep its result or error."""
        try:
            self.written = work()
        except Exception as error:
            self.error = error

    @property
    def is_done(self) -> bool:
        """Return whether the save has ended."""
        return self.thread is None or not self.thread.is_alive()


class Checkpointer:
    """Saves and resumes; every method is collective, with the same outcome on every rank."""

    def __init__(
        self, folder: Path, engine: Engine, model: ModelConfig, config: CheckpointConfig, identity: Identity
    ) -> None:
        """Prepare to keep checkpoints in `folder`, and under the run's name in `config.remote`."""
        self.config, self.identity = config, identity
        remote = None if config.remote is None else CheckpointFolder(Path(config.remote) / folder.parent.name)
        self.to = Destinations(
            local=CheckpointFolder(folder),
            keep=Keep(config.keep_last, config.keep_every),
            remote=remote,
            remote_keep=Keep(config.remote_keep_last),
        )
        # The writing thread and the training thread must not share a group: their collectives would interleave.
        self._group, self._writers = make_host_group(), make_host_group()
        self.contents = Contents(engine, model, self._writers)
        self._pending: Pending | None = None
        self._on_written: Callable[[int], object] = lambda step: None
        self.stall_seconds = 0.0
        """How long the newest `save` held up training."""
        self.last_written: Written | None = None
        """The newest save known to be committed."""

    def tell(self, on_written: Callable[[int], object], in_use: Callable[[], Collection[int]]) -> None:
        """Register callbacks: `on_written(step)` after each commit; `in_use()` returns steps not to be removed."""
        self._on_written = on_written
        self.to = replace(self.to, in_use=in_use)

    def save(self, state: TrainingState, *, disk_is_full: bool = False) -> None:
        """Save; with `checkpoint.asynchronous` a thread writes while training continues. One save at a time.

        With the injected fault `disk_is_full` this rank's writing fails as on a full disk.

        Raises:
            CheckpointError: this save or the previous one failed, and `checkpoint.on_error` is stop.
        """
        start = time.monotonic()
        self.wait()
        snapshot, progress = self.contents.try_snapshot(), deepcopy(state)
        pending = self._pending = Pending(state.step)

        def work() -> Written:
            save_id = from_first(self._writers, lambda: secrets.token_hex(8))
            saved = SavedState(save_id, progress, snapshot.updates, self.identity)
            return save(snapshot, saved, self.to, self._writers, disk_is_full=disk_is_full)

        if self.config.asynchronous:
            pending.thread = threading.Thread(
                target=pending.run, args=(work,), name=f"checkpoint-{state.step}", daemon=True
            )
            pending.thread.start()
        else:
            pending.run(work)
        self.stall_seconds = time.monotonic() - start
        if not self.config.asynchronous:
            self._conclude()

    def poll(self) -> None:
        """Poll the background save; call once a step. Costs nothing if none is running.

        Raises:
            CheckpointError: it failed, and `checkpoint.on_error` is stop.
        """
        if self._pending is None:
            return
        unfinished = torch.tensor(int(not self._pending.is_done))
        dist.all_reduce(unfinished, group=self._group)
        if not int(unfinished):
            self._conclude()

    def wait(self) -> None:
        """Wait for the running save, if any.

        Raises:
            CheckpointError: it failed, and `checkpoint.on_error` is stop.
        """
        if self._pending is not None:
            if self._pending.thread is not None:
                self._pending.thread.join()
            self._conclude()

    def resume(self) -> TrainingState | None:
        """Load the newest whole checkpoint, local or remote; return its state, or None if there is none.

        With `checkpoint.resume=false` existing checkpoints are moved aside first.

        Raises:
            CheckpointError: there are checkpoints, but none is usable.
            ConfigError: the newest is of another model or other data.
        """
        if not self.config.resume:
            on_all(self._group, self._set_aside)
            return None
        return self.restore()

    def restore(self, before: int | None = None) -> TrainingState | None:
        """Load weights, moments and tables from the newest whole checkpoint, of a step below `before` if given.

        May be called during a run; newer checkpoints stay until training saves their steps again.

        Returns:
            The checkpoint's state; None if there is none.

        Raises:
            CheckpointError: there are checkpoints, but none is usable.
            ConfigError: the newest is of another model or other data.
        """
        self.wait()
        search = newest_valid(self._folders(), self._group, before)
        if search.found is None:
            return None
        path = search.found
        saved = on_all(self._group, lambda: SavedState.read(path))
        self.identity.check(saved.identity, path)
        if is_first(self._group):
            self._put_away(list(search.skipped))
        self._load(path, saved, "resumed from")
        return saved.progress

    def adopt(self, folder: Path, step: int | None) -> tuple[Path, SavedState]:
        """Load weights, moments and tables from another run's checkpoint: of `step`, or the newest whole one.

        Returns:
            The checkpoint's folder, and the content of its state.json.

        Raises:
            CheckpointError: it is damaged or missing.
            ConfigError: it is of another model.
        """
        other = CheckpointFolder(folder)
        path = None if step is None else other.final(step)
        if path is None:
            path = newest_valid([other], self._group).found
            if path is None:
                raise CheckpointError(f"{folder} holds no checkpoint")
        elif problems := verify(path, self._group):
            raise CheckpointError(f"{path} cannot be branched from: {'; '.join(problems)}")
        at = path
        saved = on_all(self._group, lambda: SavedState.read(at))
        check_model(self.identity.model, saved.identity.model, at, "or branch from another run")
        self._load(at, saved, "weights and moments of")
        return at, saved

    def _load(self, path: Path, saved: SavedState, how: str) -> None:
        boxes, slots, ranges = self.contents.wanted()
        read(boxes, path, self._group)
        self.contents.take(slots, ranges, saved.updates)
        self._describe(path, saved, how)

    def close(self) -> None:
        """Wait a limited time for a running save, and destroy the groups."""
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join(LAST_SAVE_SECONDS)
            if self._pending.thread.is_alive():
                log.error("the checkpoint of step %d was still being written; it is lost", self._pending.step)
                return
        for group in (self._group, self._writers):
            dist.destroy_process_group(group)

    def _conclude(self) -> None:
        """Log the result of the save that has ended, or handle its failure."""
        pending, self._pending = self._pending, None
        assert pending is not None
        self.last_written = pending.written or self.last_written
        if pending.error is not None:
            error = pending.error if isinstance(pending.error, CheckpointError) else None
            text = str(error or f"{type(pending.error).__name__}: {pending.error}")
            if self.config.on_error == "stop":
                raise CheckpointError(
                    f"{text}; the checkpoints before it are as they were. Make room or repair the folder, and "
                    "start again; checkpoint.on_error=continue would go on training without it."
                ) from pending.error
            if is_first(self._group):
                log.error("%s; training goes on, with the checkpoints before it (on_error=continue)", text)
            return
        if is_first(self._group) and pending.written is not None:
            megabytes = pending.written.size / 1e6
            log.info(
                "saved step %d: %.1f MB in %.2f s (%.0f MB/s, with checksums); training was held up for %.3f s",
                pending.step,
                megabytes,
                pending.written.seconds,
                megabytes / max(pending.written.seconds, 1e-9),
                self.stall_seconds,
            )
        self._on_written(pending.step)

    def _folders(self) -> list[CheckpointFolder]:
        return [folder for folder in (self.to.local, self.to.remote) if folder is not None]

    def _set_aside(self) -> None:
        if is_first(self._group):
            for folder in self._folders():
                if (target := folder.set_aside()) is not None:
                    log.warning(
                        "checkpoint.resume=false: the checkpoints of the run before were moved to %s", target
                    )

    def _put_away(self, damaged: list[Path]) -> None:
        for path in damaged:
            if path.parent == self.to.local.path and (target := self.to.local.mark_damaged(path)):
                log.warning(
                    "%s is now %s: it is out of the way, and kept for you to look at", path, target.name
                )

    def _describe(self, path: Path, saved: SavedState, how: str) -> None:
        if not is_first(self._group):
            return
        progress, was, now = saved.progress, saved.identity.topology, self.identity.topology
        log.info("%s %s: %d steps, %d sequences done", how, path, progress.step, progress.samples)
        if was != now:
            changed = [key for key in now if was.get(key) != now[key]]
            before, after = (", ".join(f"{key} {side.get(key)}" for key in changed) for side in (was, now))
            log.info("resharded from %s to %s", before, after)
