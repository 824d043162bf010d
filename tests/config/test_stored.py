import json

import pytest

from tide_mega.files import DEEPEST, parse_json


def nested(levels):
    return "[" * levels + "]" * levels


def test_json_of_sensible_depth_is_read():
    assert parse_json(nested(DEEPEST)) == json.loads(nested(DEEPEST))
    wide = [{"a": [[number]]} for number in range(100)]
    assert parse_json(json.dumps(wide).encode()) == wide
    assert parse_json(json.dumps({"a": "[" * 100})) == {"a": "[" * 100}


@pytest.mark.parametrize("levels", [DEEPEST + 1, 900, 20_000])
@pytest.mark.parametrize("form", [str, str.encode], ids=["text", "bytes"])
def test_json_of_absurd_depth_is_refused(levels, form):
    with pytest.raises(ValueError, match="nested more than 32 levels deep"):
        parse_json(form(nested(levels)))


def test_objects_count_like_lists():
    with pytest.raises(ValueError, match="nested more than 32 levels deep"):
        parse_json('{"a": ' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1))
