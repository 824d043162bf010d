"""An exported folder needs nothing of this package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from tide_mega import hf

ALLOWED = {"torch", "numpy", "transformers"} | set(sys.stdlib_module_names)

ALONE = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tide_mega", "tests", "megatron"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.tensor(ids)).logits
inputs = tokenizer("def main(", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=5)[0])
assert "tide_mega" not in sys.modules
torch.save(logits, sys.argv[3])
print(json.dumps(text))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tables": "int4", "memory": "sidecar"}])
def test_a_process_that_cannot_see_this_package_loads_it(exported, runs, options, tmp_path):
    ids = [[5, 17, 400, 3], [9, 9, 8, 2]]
    words = [str(exported("tied", **options)), json.dumps(ids), str(tmp_path / "logits.pt")]
    ended = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]).startswith("def main(")
    if not options:
        found = torch.load(tmp_path / "logits.pt")
        torch.testing.assert_close(found, runs["tied"].logits(torch.tensor(ids)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", sorted(Path(hf.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_its_code_imports_nothing_else(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom):
            name = str(node.module)
            assert (
                node.level == 1 and name.endswith("_tide")
                if node.level
                else name.partition(".")[0] in ALLOWED
            )


def test_the_models_file_names_all_others():
    """transformers before 5.12 copies the files that the first one names, and not what these name in turn."""
    folder = Path(hf.__file__).parent
    text = (folder / "modeling_tide.py").read_text(encoding="utf-8")
    named = {path.stem for path in folder.glob("*_tide.py") if f"from .{path.stem} import" in text}
    assert named | {"modeling_tide"} == {path.stem for path in folder.glob("*_tide.py")}
