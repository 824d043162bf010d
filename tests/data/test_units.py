from hypothesis import given
from hypothesis import strategies as st

from tide_mega.data.prepare.inputs import InputFile, plan_units


def file(number: int, size: int, kind: str) -> InputFile:
    return InputFile(f"/x/{number}", f"{number}", kind, size, 0)  # type: ignore[arg-type]


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 500), st.sampled_from(["text", "jsonl", "jsonl.zst"])), max_size=30
    ),
    unit_bytes=st.integers(1, 300),
)
def test_units_cover_every_byte_once_in_order(sizes: list[tuple[int, str]], unit_bytes: int) -> None:
    files = [file(i, size, kind) for i, (size, kind) in enumerate(sizes)]
    units = plan_units(files, unit_bytes)
    pieces = [piece for unit in units for piece in unit.pieces]
    covered = [
        (piece.file.name, start)
        for piece in pieces
        for start in range(piece.start, piece.file.size if piece.stop is None else piece.stop)
    ]
    assert covered == [(f.name, offset) for f in files for offset in range(f.size)]
    assert [unit.number for unit in units] == list(range(len(units)))
    assert all(unit.size >= unit_bytes for unit in units[:-1])
    for unit in units:
        if all(piece.file.kind == "jsonl" for piece in unit.pieces):
            assert unit.size < 2 * unit_bytes


def test_automatic_size_is_a_64th_within_bounds() -> None:
    assert len(plan_units([file(0, 6 * 2**20, "jsonl")], 0)) == 2
    assert len(plan_units([file(0, 64 * 10 * 2**20, "jsonl")], 0)) == 64
    assert len(plan_units([file(0, 2**40, "jsonl")], 0)) == 2**40 // (512 * 2**20)


def test_description_names_no_folder_but_tells_files_apart() -> None:
    one, other = (
        plan_units([InputFile(path, "a.txt", "text", 3, 7)], 10)[0] for path in ("/x/a.txt", "/y/a.txt")
    )
    assert one.describe() == other.describe()
    changed = plan_units([InputFile("/x/a.txt", "a.txt", "text", 3, 8)], 10)[0]
    assert one.describe() != changed.describe()
