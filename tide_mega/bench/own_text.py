"""This package's own sources as a dataset: text that is always at hand."""

from pathlib import Path

import tide_mega
from tide_mega.data.options import PrepareOptions
from tide_mega.data.prepare import prepare


def prepare_own_text(folder: Path, vocab_size: int) -> Path:
    """Tokenise the package's sources with a BPE of `vocab_size`; return the prepared folder."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(Path(tide_mega.__file__).parent.rglob("*.py"))):
        (text / f"{number:03d}.txt").write_text(path.read_text(encoding="utf-8") or "empty\n")
    options = PrepareOptions(
        inputs=[str(text)],
        out=str(folder / "data"),
        tokenizer=f"bpe:{vocab_size}",
        validation_fraction=0.2,
        workers=1,
    )
    prepare(options, log=lambda _: None, progress=False)
    return folder / "data"
