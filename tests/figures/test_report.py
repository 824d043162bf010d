"""The report shows any text in names, stored sections and reasons without the browser executing it."""

from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.lab.figures.registry import DIAGNOSTICS, Diagnostic
from tide_mega.lab.figures.report import Missing, write_report
from tide_mega.lab.figures.section import DataTable, SavedSection

PLANTED = (
    "<script>document.title='MARKER'</script>",
    "<img src=x onerror=\"document.title='MARKER'\">",
    "\"'><svg onload=document.title='MARKER'></svg>",
    "</title></style><!-- MARKER -->",
    "<a href=\"javascript:document.title='MARKER'\">&lt;b&gt;&#60;i&#62;",
)
CONFIG = SimpleNamespace(
    model=ModelConfig(
        name="tiny",
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=2,
    ),
    memory=MemoryConfig(),
)


class Structure(HTMLParser):
    """Elements with their attributes as often as they are there, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[object] = Counter()
        self.text, self.comments, self.policy = "", 0, ""

    def handle_starttag(self, tag, attrs):
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
            assert not self.elements["title"]
        shown = ("src", "content")  # what a picture is and what the policy says are looked at by themselves
        self.elements[tag, tuple((k, "" if k in (*shown, "alt", "id", "href") else v) for k, v in attrs)] += 1

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.comments += 1


def report(tmp_path, word):
    """A report with `word` in every field that it takes, and a figure called so."""
    file = word.replace("/", "-")
    for suffix in ("png", "svg"):
        (tmp_path / f"{file}.{suffix}").write_text(word)
    table = DataTable.of([word], [[word]] * 201)
    of = Diagnostic(word, word, word, word, word)
    section = SavedSection(tmp_path, of, word, (word,), (word,), {word: table}, (file,), {word: word}, 0.0)
    run = SimpleNamespace(label=word, num_blocks=2, config=CONFIG, step=3, tokens=4)
    write_report(tmp_path / "report.html", [run], [section], [Missing(word, word, word)])
    parsed = Structure()
    parsed.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    parsed.close()
    return parsed


@pytest.mark.parametrize("word", PLANTED)
def test_no_field_of_a_report_is_markup(tmp_path, word):
    plain, planted = report(tmp_path, "word"), report(tmp_path, word)
    assert planted.elements == plain.elements, "no element or attribute more"
    assert planted.comments == 0
    assert planted.text.count(word) >= plain.text.count("word") - 2, "all of it shown, as text"


def test_the_page_forbids_scripts_before_anything_else(tmp_path):
    policy = report(tmp_path, "word").policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src" not in policy


def test_every_section_has_a_title_of_its_own():
    titles = [diagnostic.title for diagnostic in DIAGNOSTICS]
    assert all(titles) and len(set(titles)) == len(titles)
