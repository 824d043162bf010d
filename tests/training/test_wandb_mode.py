from pathlib import Path

import pytest

from tide_mega.training.loggers import has_login, resolve_mode


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_DISABLED",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize("wanted", ["online", "offline", "disabled"])
def test_a_mode_that_is_asked_for_is_kept(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode(wanted) == wanted
    monkeypatch.setenv("WANDB_MODE", wanted)
    assert resolve_mode("auto") == wanted


def test_auto_is_online_with_a_key_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine example.org login user password secret\n")
    assert not has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org:8080")
    assert has_login()
    netrc.write_text("this is not a netrc file\n")
    assert not has_login()


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on"])
def test_wandb_disabled_turns_it_off_unless_the_configuration_asks_for_it(monkeypatch, word):
    monkeypatch.setenv("WANDB_DISABLED", word)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"


@pytest.mark.parametrize("word", ["false", "0", ""])
def test_wandb_disabled_can_say_no(monkeypatch, word):
    monkeypatch.setenv("WANDB_DISABLED", word)
    assert resolve_mode("auto") == "offline"


@pytest.mark.parametrize(("former", "now"), [("dryrun", "offline"), ("run", "online")])
def test_former_modes_are_understood(monkeypatch, former, now):
    monkeypatch.setenv("WANDB_MODE", former)
    assert resolve_mode("auto") == now
