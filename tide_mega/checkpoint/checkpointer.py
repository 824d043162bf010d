"""The run's door to its checkpoints: save without holding up training, resume from the newest whole one."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from tide_mega.checkpoint.contents import Contents
from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.job import Destinations, Keep, Written, save
from tide_mega.checkpoint.planners import read
from tide_mega.checkpoint.search import newest_valid, verify
from tide_mega.checkpoint.state import Identity, SavedState, TrainingState, check_model
from tide_mega.checkpoint.together import from_first, is_first, on_all
from tide_mega.config.schema import CheckpointConfig, ModelConfig
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import make_host_group

log = logging.getLogger(__name__)
LAST_SAVE_SECONDS = 120.0
"""How long a run that ends by an error waits for a save under way."""


@dataclass
class Pending:
    """A save under way."""

    step: int
    thread: threading.Thread | None = None
    written: Written | None = None
    error: Exception | None = None

    def run(self, work: Callable[[], Written]) -> None:
        """Do the work and keep what came of it."""
        try:
            self.written = work()
        except Exception as error:
            self.error = error

    @property
    def is_done(self) -> bool:
        """Whether nothing runs any more."""
        return self.thread is None or not self.thread.is_alive()


class Checkpointer:
    """Saves and resumes; every method is collective and its outcome the same on every rank."""

    def __init__(
        self, folder: Path, engine: Engine, model: ModelConfig, config: CheckpointConfig, identity: Identity
    ) -> None:
        """Prepare to keep checkpoints in `folder`, and in `config.remote` under the run's name."""
        self.config, self.identity = config, identity
        remote = None if config.remote is None else CheckpointFolder(Path(config.remote) / folder.parent.name)
        self.to = Destinations(
            local=CheckpointFolder(folder),
            keep=Keep(config.keep_last, config.keep_every),
            remote=remote,
            remote_keep=Keep(config.remote_keep_last),
        )
        # The thread that writes and the training thread never share a group: their collectives would mix.
        self._group, self._writers = make_host_group(), make_host_group()
        self.contents = Contents(engine, model, self._writers)
        self._pending: Pending | None = None
        self._on_written: Callable[[int], object] = lambda step: None
        self.stall_seconds = 0.0
        """How long the newest `save` held up training."""
        self.last_written: Written | None = None
        """The newest save that is known to be committed."""

    def tell(self, on_written: Callable[[int], object], in_use: Callable[[], Collection[int]]) -> None:
        """Tell `on_written` the step of each save once it is committed, and keep the steps `in_use` meanwhile."""
        self._on_written = on_written
        self.to = replace(self.to, in_use=in_use)

    def save(self, state: TrainingState, *, disk_is_full: bool = False) -> None:
        """Save; with `checkpoint.asynchronous` training goes on while a thread writes. One save at a time.

        With `disk_is_full`, a fault brought about on purpose, this rank's writing fails as on a full disk.

        Raises:
            CheckpointError: this save, or the one before, failed, and `checkpoint.on_error` is stop.
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
        """See once a step how the save under way does; free where there is none.

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
        """Wait for the save under way.

        Raises:
            CheckpointError: it failed, and `checkpoint.on_error` is stop.
        """
        if self._pending is not None:
            if self._pending.thread is not None:
                self._pending.thread.join()
            self._conclude()

    def resume(self) -> TrainingState | None:
        """Continue from the newest whole checkpoint, local or remote; None where there is none.

        With `checkpoint.resume=false` older checkpoints are moved aside first.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
            ConfigError: the newest is of another model or other data.
        """
        if not self.config.resume:
            on_all(self._group, self._set_aside)
            return None
        return self.restore()

    def restore(self, before: int | None = None) -> TrainingState | None:
        """Put weights, moments and tables back to the newest whole checkpoint, of a step less than `before`.

        Also during a run; newer checkpoints stay until training saves their steps again.

        Returns:
            Where it stood; None where there is none.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
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
        """Take weights, moments and tables of another run's checkpoint: of a step, or the newest whole one.

        Returns:
            Its folder, and what it says of itself.

        Raises:
            CheckpointError: it is damaged or not there.
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
        """Let a save under way finish, for a while, and leave the groups."""
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join(LAST_SAVE_SECONDS)
            if self._pending.thread.is_alive():
                log.error("the checkpoint of step %d was still being written; it is lost", self._pending.step)
                return
        for group in (self._group, self._writers):
            dist.destroy_process_group(group)

    def _conclude(self) -> None:
        """Report the save that ended, or its failure."""
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
