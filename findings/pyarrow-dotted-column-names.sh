#!/bin/bash
# pyarrow 26.0.1.
#
# Behaviour: in `columns`, ParquetFile.iter_batches takes "a.b" for the top-level column of that name and for the field b
# of a struct column a, both at once. The batches then have two columns for the one asked for, in the file's order, so
# that the first is the struct where the struct was written first.
#
# Output seen:
#   asked for a.b of a, a.b: got a = {'b': 'of the struct'}, a.b = of the column
#   asked for a.b of a.b, a: got a.b = of the column, a = {'b': 'of the struct'}
#
# Why it matters here: the column that holds a corpus's text is named in the configuration, and a reader that takes a
# batch's first column trains on another text for such a name, without any error. A column has to be taken from a batch
# by its whole name.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "pyarrow==26.0.1" >/dev/null
cat >"$work/dotted.py" <<'PYTHON'
import io

import pyarrow
import pyarrow.parquet

struct = ("a", pyarrow.array([{"b": "of the struct"}]))
column = ("a.b", pyarrow.array(["of the column"]))
for columns in ([struct, column], [column, struct]):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file)
    (batch,) = pyarrow.parquet.ParquetFile(file).iter_batches(columns=["a.b"])
    written = [name for name, _ in columns]
    got = ", ".join(f"{name} = {values[0].as_py()}" for name, values in zip(batch.schema.names, batch.columns))
    print(f"asked for a.b of {', '.join(written)}: got {got}")
    assert batch.schema.names == written, f"a.b alone was asked for, and no longer are both read: {batch.schema.names}"
    assert batch.to_pylist() == [{"a": {"b": "of the struct"}, "a.b": "of the column"}]
PYTHON
"$work/venv/bin/python" "$work/dotted.py"
