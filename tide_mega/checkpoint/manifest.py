"""The manifest, written last: every file of a checkpoint with its size and SHA-256.

SHA-256 because processors have instructions for it: 1.5 GB/s on one core here, against 0.7 of BLAKE2b.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.config.paths import plain_name, regular_file
from tide_mega.config.stored import read_json
from tide_mega.data.atomic import sha256_of, to_disk

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
FORMAT = 1
"""Version of the layout of checkpoints."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Describe a file as it is."""
        return cls(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    save_id: str
    """Random, the same in all files of a save: files of two saves never fit together."""
    files: dict[str, FileRecord]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into `folder` and see it to disk."""
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        to_disk(path)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            CheckpointError: it is missing, cannot be read, is of another format, or names files elsewhere.
        """
        try:
            content = read_json(folder, MANIFEST_FILE)
            files = {plain_name(name): FileRecord(**record) for name, record in content.pop("files").items()}
            manifest = cls(files=files, **content)
        except FileNotFoundError as error:
            raise CheckpointError(f"{MANIFEST_FILE} is missing") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_FILE} cannot be read ({error})") from error
        if manifest.format != FORMAT:
            raise CheckpointError(f"it has format {manifest.format}, and this version reads {FORMAT}")
        return manifest

    def problems_outside(self, folder: Path) -> list[str]:
        """Return what names and sizes tell: files missing, links in their place, or of another size or save.

        What else lies there is no damage (`foreign`).
        """
        problems = []
        for name, record in sorted(self.files.items()):
            try:
                size = regular_file(folder, name).stat().st_size
            except FileNotFoundError:
                problems.append(f"{name} is missing")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error})")
            except ValueError as error:
                problems.append(str(error))
            else:
                if size != record.size:
                    problems.append(f"{name} has {size} bytes instead of {record.size}")
        if not problems and (said := _said_by(folder)) != (self.step, self.save_id):
            problems.append(f"{STATE_FILE} is of another save than {MANIFEST_FILE}: {said}")
        return problems

    def foreign(self, folder: Path) -> list[str]:
        """Return the names of what lies in the folder and is no part of the checkpoint, such as `.nfs…`."""
        return sorted({path.name for path in folder.iterdir()} - self.files.keys() - {MANIFEST_FILE})

    def problems_inside(self, folder: Path, names: list[str]) -> list[str]:
        """Return which of these files do not have their checksum; reads them whole."""
        problems = []
        for name in names:
            try:
                if sha256_of(folder / name) != self.files[name].sha256:
                    problems.append(f"{name} does not have its checksum")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error})")
        return problems


def _said_by(folder: Path) -> tuple[Any, Any]:
    try:
        content = read_json(folder, STATE_FILE)
        return content["progress"]["step"], content["save_id"]
    except (OSError, ValueError, TypeError, KeyError):
        return None, None
