"""Passwords and tokens in URLs are neither printed nor stored."""

from pathlib import Path

import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig
from tide_mega.config.sweep import SweepLog
from tide_mega.config.validate import validate
from tide_mega.errors import ConfigError, StatedError, is_url, without_credentials

URL = "https://user:MARKER@example.org/a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:MARKER@example.org/a", "https://example.org/a"),
        ("https://MARKER@example.org/a@b", "https://example.org/a@b"),
        ("cloning ssh://git@example.org:22/a: failed", "cloning ssh://example.org:22/a: failed"),
        ("s3://b/c?X-Amz-Signature=MARKER&x=1", "s3://b/c?X-Amz-Signature=***&x=1"),
        ("https://example.org/?access_token=MARKER", "https://example.org/?access_token=***"),
        ("https://a:p@ss:MARKER@example.org", "https://example.org"),
        ("no URL: me@example.org, runs/a@3", "no URL: me@example.org, runs/a@3"),
        ("https://example.org/?page=2", "https://example.org/?page=2"),
    ],
)
def test_urls_lose_their_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


class LongReportError(StatedError):
    """An error of several lines."""

    has_lines = True


@pytest.mark.parametrize("kind", [StatedError, ConfigError, LongReportError])
def test_no_sentence_of_ours_has_them(kind: type[StatedError]) -> None:
    said = str(kind(f"{URL} is not there, nor is s3://b/c?token=MARKER : give another."))
    assert said == "https://example.org/a is not there, nor is s3://b/c?token=*** : give another."


@pytest.mark.parametrize(
    "word",
    [
        *(f"{key}={URL}" for key in ("run.root", "checkpoint.remote", "data.path", "data.perplexity_texts")),
        f"+logging.wandb_entity={URL}",
        f"data.path={URL},{URL}b",
        "data.path='https://example.org/a?token=MARKER'",
    ],
)
def test_no_word_of_a_command_line_has_them(word: str) -> None:
    """Not even in one that would be refused for something else: a sweep's words are written down first."""
    with pytest.raises(ConfigError) as refusal:
        compose([word])
    assert "has a user, password or token in its URL, and is stored: leave that out." in str(refusal.value)
    assert "MARKER" not in str(refusal.value)


def test_no_configuration_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config: TideConfig = compose(["experiment=demo_base"])
    for key in ("perplexity_texts", "path"):
        monkeypatch.setattr(config.data, key, [URL] if key.endswith("s") else URL)
        with pytest.raises(ConfigError, match=f"^data.{key}=https://example.org/a has a user"):
            validate(config)
        monkeypatch.undo()


@pytest.mark.parametrize("key", ["run.root", "checkpoint.remote", "data.path"])
def test_a_url_is_no_folder(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}=s3://bucket/a is a URL, and a folder is needed: mount"):
        compose([f"{key}=s3://bucket/a"])
    assert not is_url("runs/a://b") and not is_url("C:/a")


def test_a_sweeps_reasons_have_none() -> None:
    log = SweepLog(folder=Path("not-written"))
    with log.point(0, []):
        raise ValueError(f"no answer from {URL}")
    with log.point(1, []):
        raise SystemExit(2) from ValueError(f"no answer from {URL}")
    assert [point.reason for point in log.points.values()] == [
        "ValueError: no answer from https://example.org/a",
        "no answer from https://example.org/a",
    ]
