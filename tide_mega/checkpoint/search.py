"""Finding the newest checkpoint that can be trusted."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import ProcessGroup

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.folder import REPLACED, CheckpointFolder, step_of
from tide_mega.checkpoint.manifest import Manifest
from tide_mega.checkpoint.together import from_first, gather, is_first, place

log = logging.getLogger(__name__)


@dataclass
class Search:
    """What was found."""

    found: Path | None
    skipped: dict[Path, list[str]] = field(default_factory=dict)
    """Newer ones, and what is wrong with them."""


def newest_valid(
    folders: list[CheckpointFolder], group: ProcessGroup | None = None, before: int | None = None
) -> Search:
    """Verify checkpoints, newest first, until one is whole; collective, the same result on every rank.

    Of two of the same step the one in the earlier folder is taken; with `before` only those of fewer steps.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    candidates = from_first(group, lambda: _newest_first(folders, before))
    search = Search(None)
    for path in candidates:
        problems = verify(path, group)
        if not problems:
            search.found = path
            return search
        search.skipped[path] = problems
        if is_first(group):
            log.warning("skipped %s: %s", path, "; ".join(problems))
    if search.skipped:
        listed = "; ".join(f"{path}: {', '.join(said)}" for path, said in search.skipped.items())
        raise CheckpointError(
            f"every checkpoint of this run is damaged, and a start from scratch would hide that ({listed}): "
            "restore one, or start anew with checkpoint.resume=false."
        )
    return search


def verify(path: Path, group: ProcessGroup | None = None) -> list[str]:
    """Return what is wrong with a checkpoint, nothing if it is whole; collective, each rank reads some files."""
    manifest, problems = from_first(group, lambda: _look_at(path))
    if manifest is None or problems:
        return problems
    rank, size = place(group)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    mine = manifest.problems_inside(path, by_size[rank::size])
    return sorted(problem for of_rank in gather(group, mine) for problem in of_rank)


def _newest_first(folders: list[CheckpointFolder], before: int | None) -> list[Path]:
    found = [
        (step_of(path), not path.name.endswith(REPLACED), -place, path)
        for place, folder in enumerate(folders)
        for path in folder.complete()
        if before is None or step_of(path) < before
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def _look_at(path: Path) -> tuple[Manifest | None, list[str]]:
    try:
        manifest = Manifest.read(path)
        problems = manifest.problems_outside(path)
        if manifest.step != step_of(path):
            problems.append(f"its manifest is of step {manifest.step}")
        return manifest, problems
    except (CheckpointError, OSError) as error:
        return None, [str(error)]
