"""Export files as a source of a migration: every shape, every damage, from every place on, in memory that stays flat."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memharbor.errors import SourceDataError
from memharbor.migrate.reasons import REASONS
from memharbor.migrate.record import RawItem, Refusal, item_as_data, item_from_data
from memharbor.migrate.sources.files import FileSource
from memharbor.migrate.sources.json_stream import CHUNK_BYTES

A = {"id": "a", "memory": "tea", "user_id": "alice"}
B = {"id": "b", "memory": "rain", "user_id": "bob"}
C = {"id": "c", "memory": "jazz"}

Item = RawItem | Refusal

VALUE_BYTES = 1 << 20


def read(path: Path, after: str | None = None) -> list[Item]:
    return list(FileSource(path).read(after))


def raw(item: Item) -> RawItem:
    return item.item if isinstance(item, Refusal) else item


def written(path: Path, content: str | bytes | list[Any] | Mapping[str, Any]) -> Path:
    if isinstance(content, list | dict):
        content = json.dumps(content)
    assert isinstance(content, str | bytes)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_resumes(make: Callable[[], Iterable[Item]], resume: Callable[[str], Iterable[Item]]) -> None:
    whole = list(make())
    assert len({raw(each).position for each in whole}) == len(whole)
    for at, each in enumerate(whole, 1):
        assert list(resume(raw(each).position)) == whole[at:]


OWNED_C = {**C, "user_id": "carol"}
SHAPES: dict[str, tuple[Any, list[Mapping[str, Any]]]] = {
    "a list": ([A, B], [A, B]),
    "memories": ({"metadata": {"total_memories": 2}, "memories": [A, B]}, [A, B]),
    "results": ({"results": [A, B], "relations": [{"source": "x"}]}, [A, B]),
    "sorted keys": ({"relations": [{"source": "x"}], "results": [A, B]}, [A, B]),
    "a page of the Platform": ({"count": 2, "next": None, "previous": None, "results": [A, B]}, [A, B]),
    "users": ({"alice": [A], "bob": [B], "carol": [C], "dave": []}, [A, B, OWNED_C]),
    "users with results": ({"carol": {"results": [C], "relations": []}, "bob": {"memories": [B]}}, [OWNED_C, B]),
    "a user without any": ({"alice": [A], "bob": None}, [A]),
    "one memory": (A, [A]),
    "no users": ({}, []),
    "an empty list": ([], []),
    "empty results": ({"results": []}, []),
}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_json_is_read(shape: str, indent: int | None, tmp_path: Path) -> None:
    content, expected = SHAPES[shape]
    path = written(tmp_path / "export.json", json.dumps(content, indent=indent))
    assert [raw(each).data for each in read(path)] == expected
    assert [raw(each).source_id for each in read(path)] == [each["id"] for each in expected]
    assert_resumes(lambda: read(path), lambda after: read(path, after))


def test_a_user_of_ones_own_is_not_replaced_by_the_key(tmp_path: Path) -> None:
    path = written(tmp_path / "export.json", {"team": [A, {"id": "x", "userId": "zoe"}]})
    assert [raw(each).data.get("user_id") for each in read(path)] == ["alice", None]


def test_the_first_platform_api_is_read(tmp_path: Path) -> None:
    item = {"id": "mem_abc123", "content": "dark mode", "user_id": "u", "created_at": "2025-01-15T10:00:00Z"}
    (found,) = read(written(tmp_path / "x.json", {"user-1": [item]}))
    assert found == RawItem("memory", "mem_abc123", item, "1")


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "x.jsonl.gz", "x"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_json_lines_are_read_under_any_name(name: str, end: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, end.join([json.dumps(A), json.dumps(B), json.dumps(OWNED_C)]))
    assert [raw(each).data for each in read(path)] == [A, B, OWNED_C]
    assert_resumes(lambda: read(path), lambda after: read(path, after))


@pytest.mark.parametrize("name", ["x.gz", "x.json", "x.jsonl"])
@pytest.mark.parametrize("is_lines", [True, False])
def test_gzip_is_unpacked_by_what_it_is(name: str, is_lines: bool, tmp_path: Path) -> None:
    if name == "x.jsonl" and not is_lines:
        name = "y.json"
    text = f"{json.dumps(A)}\n{json.dumps(B)}\n" if is_lines else json.dumps({"memories": [A, B]})
    path = written(tmp_path / name, gzip.compress(text.encode()))
    assert [raw(each).data for each in read(path)] == [A, B]
    assert_resumes(lambda: read(path), lambda after: read(path, after))


def test_memories_one_after_the_other_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", f"{json.dumps(A, indent=2)}\n{json.dumps(B, indent=2)}\n")
    assert [raw(each).data for each in read(path)] == [A, B]
    assert_resumes(lambda: read(path), lambda after: read(path, after))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    for name, text in (("x.json", json.dumps([A])), ("x.jsonl", json.dumps(A))):
        assert [raw(each).data for each in read(written(tmp_path / name, b"\xef\xbb\xbf" + text.encode()))] == [A]


BAD = {
    "broken": (b'{"id": "x", "memory": }', "bad-json"),
    "no quote": (b'{"id": "x" "memory": "y"}', "bad-json"),
    "a list": (b'["x"]', "bad-json"),
    "a text": (b'"x"', "bad-json"),
    "null": (b"null", "bad-json"),
    "a number": (b"17", "bad-json"),
    "invalid UTF-8": (b'{"id": "x", "memory": "\xff"}', "bad-text"),
    "a surrogate's bytes": (b'{"id": "x", "memory": "\xed\xa0\x80"}', "bad-text"),
    "half a surrogate": (b'{"id": "x", "memory": "\\ud83d"}', "bad-text"),
    "half a surrogate in a key": (b'{"id": "x", "metadata": [{"\\uDE00": 1}]}', "bad-text"),
    "an escaped NUL": (b'{"id": "x", "memory": "a\\u0000"}', "bad-text"),
    "a NUL": (b'{"id": "x", "memory": "a\0"}', "bad-text"),
    "NaN": (b'{"id": "x", "score": NaN}', "bad-number"),
    "Infinity": (b'{"id": "x", "score": -Infinity}', "bad-number"),
    "too large": (b'{"id": "x", "score": 1e999}', "bad-number"),
    "too many digits": (b'{"id": "x", "score": ' + b"9" * 5000 + b"}", "bad-number"),
    "too deep": (b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad-json"),
    "an id that is none": (b'{"id": {"x": 1}, "memory": "y"}', "bad-json"),
    "an embedding that is none": (b'{"id": "x", "embedding": {"x": 1}}', "bad-vector"),
    "an embedding of texts": (b'{"id": "x", "embedding": ["1"]}', "bad-vector"),
    "an embedding of truths": (b'{"id": "x", "vector": [true]}', "bad-vector"),
    "an embedding beyond floats": (b'{"id": "x", "embedding": [1' + b"0" * 400 + b"]}", "bad-vector"),
    "an embedding cut off": (b'{"id": "x", "embedding": "AACA"}', "wrong-dims"),
    "an embedding in another spelling": (b'{"id": "x", "embedding": "text-embedding-3"}', "bad-vector"),
}


@pytest.mark.parametrize("kind", ["lines", "list", "users"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_item_is_refused_and_the_next_is_read(bad: str, kind: str, tmp_path: Path) -> None:
    content, reason = BAD[bad]
    first, last = json.dumps(A).encode(), json.dumps(B).encode()
    if kind == "lines":
        path = written(tmp_path / "x.jsonl", b"\n".join([first, content, last]))
    elif kind == "list":
        path = written(tmp_path / "x.json", b"[" + b", ".join([first, content, last]) + b"]")
    else:
        path = written(tmp_path / "x.json", b'{"u": [' + b", ".join([first, content, last]) + b"]}")
    good, refused, other = read(path)
    assert [raw(good).data, raw(other).data] == [A, B]
    assert isinstance(refused, Refusal)
    assert refused.reason == reason
    assert refused.reason in REASONS
    assert refused.detail
    # It can be written down and taken up again.
    text = json.dumps(item_as_data(refused.item), allow_nan=False).encode()
    assert item_from_data(json.loads(text)) == refused.item
    assert_resumes(lambda: read(path), lambda after: read(path, after))


def test_a_refused_line_is_kept_as_it_was(tmp_path: Path) -> None:
    (refused,) = read(written(tmp_path / "x.jsonl", b'{"memory": "\xff"}'))
    assert raw(refused).data == {"raw": '{"memory": "\\xff"}'}
    (refused,) = read(written(tmp_path / "x.jsonl", b'{"id": "x", "embedding": ["1"]}'))
    assert (raw(refused).source_id, raw(refused).data) == ("x", {"id": "x", "embedding": ["1"]})


def test_a_broken_first_line_does_not_hide_that_there_are_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.txt", b'{"id": "a", "memory": "tea\n' + json.dumps(B).encode() + b"\n" + json.dumps(A).encode()
    )
    refused, *good = read(path)
    assert isinstance(refused, Refusal)
    assert [raw(each).data for each in good] == [B, A]


@pytest.mark.parametrize("kind", ["lines", "list", "packed"])
def test_an_item_that_is_too_large_is_refused_without_being_held(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("files", "json_stream"):
        monkeypatch.setattr(f"memharbor.migrate.sources.{module}.VALUE_BYTES", VALUE_BYTES)
    large = json.dumps({"id": "x", "memory": "é\\" * (VALUE_BYTES // 2)}, ensure_ascii=False)
    parts = [json.dumps(A), large, json.dumps(B)]
    text = ("\n".join(parts) if kind != "list" else f"[{','.join(parts)}]").encode()
    path = written(
        tmp_path / ("x.json" if kind == "list" else "x.jsonl"), gzip.compress(text, 1) if kind == "packed" else text
    )
    good, refused, other = read(path)
    assert [raw(good).data, raw(other).data] == [A, B]
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.item.data["is_cut_off"]) == ("bad-json", True)
    assert_resumes(lambda: read(path), lambda after: read(path, after))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"alice": [%s], "bob": {"error": "timeout"}, "carol": "x"}', ["bad-json", "bad-json"]),
        ('{"alice": [%s], "b\\ud800": [{"id": "y"}]}', ["bad-text"]),
    ],
)
def test_a_user_whose_memories_are_none_is_refused(content: str, reason: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", content % json.dumps(A))
    good, *refused = read(path)
    assert raw(good).data == A
    assert [each.reason for each in refused if isinstance(each, Refusal)] == reason
    assert_resumes(lambda: read(path), lambda after: read(path, after))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"hello", "neither JSON nor JSON lines"),
        (b"id,memory\n1,tea\n", "neither JSON nor JSON lines"),
        (b'{"version": 1, "things": {"a": 2}}', "`version`, `things`"),
        (b'[{"id": "a"}, {"id": "b"', "ends inside the value that begins at byte 14"),
        (b'[{"id": "a"}', "ends at byte 12"),
        (b'{"results": [{"id": "a"}]', "ends at byte 25"),
        (b'[{"id": "a"}; {"id": "b"}]', "has `;` at byte 12"),
        (b'[{"id": "a"},]', "has `]` at byte 13"),
        (b'[{"id": "a"}] x', "has `x` at byte 14"),
        (b'{"u": [{"id": "a"}], 7: []}', "has `7` at byte 21"),
        ("[]".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_is_no_export_is_said_to_be_none(content: bytes, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", content)
    with pytest.raises(SourceDataError, match=said) as error:
        read(path)
    assert str(path) in error.value.message
    with pytest.raises(SourceDataError):
        list(FileSource(path).read())


def test_what_comes_before_the_damage_is_read(tmp_path: Path) -> None:
    packed = gzip.compress("".join(json.dumps({**A, "id": str(n)}) + "\n" for n in range(50_000)).encode())
    path = written(tmp_path / "x.jsonl.gz", packed[: len(packed) // 2])
    found: list[Item] = []
    with pytest.raises(SourceDataError, match="damaged"):
        found.extend(FileSource(path).read())
    assert found
    assert all(isinstance(each, RawItem) for each in found)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_is_not_there_is_said_not_to_be(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.json")
    for use in (FileSource(tmp_path / "x.json").describe, FileSource(tmp_path / "x.json").read):
        with pytest.raises(SourceDataError, match="cannot be read"):
            list(use())  # type: ignore[call-overload]


def test_a_position_of_another_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceDataError, match="no position"):
        read(written(tmp_path / "x.json", [A]), "vectors 7")


def test_numbers_stay_exact(tmp_path: Path) -> None:
    text = '[{"id": 7, "metadata": {"n": 123456789012345678901234567890, "x": 0.1, "e": 1.5e3, "z": 1.0}}]'
    (found,) = read(written(tmp_path / "x.json", text))
    metadata = raw(found).data["metadata"]
    assert metadata == {"n": 123456789012345678901234567890, "x": 0.1, "e": 1500.0, "z": 1.0}
    assert [type(value) for value in metadata.values()] == [int, float, float, float]
    assert raw(found).source_id == "7"


FLOATS = (1.0, -0.5, 1.401298464324817e-45, -0.0)


@pytest.mark.parametrize("key", ["embedding", "vector"])
@pytest.mark.parametrize(
    "spelled",
    [list(FLOATS), base64.b64encode(struct.pack("<4f", *FLOATS)).decode(), "[1, -0.5, 1.401298464324817e-45, -0.0]"],
)
def test_an_embedding_is_carried_bit_for_bit(key: str, spelled: Any, tmp_path: Path) -> None:
    (found,) = read(written(tmp_path / "x.jsonl", {**A, key: spelled}))
    assert raw(found).data == A
    assert struct.pack("<4f", *raw(found).vector or ()) == struct.pack("<4f", *FLOATS)
    assert FileSource(tmp_path / "x.jsonl").describe().dims == 4


@pytest.mark.parametrize("spelled", [None, [], ""])
def test_no_embedding_is_none(spelled: Any, tmp_path: Path) -> None:
    assert read(written(tmp_path / "x.jsonl", {**A, "embedding": spelled})) == [
        RawItem("memory", "a", A, "1@" + str(_size(tmp_path)))
    ]
    assert FileSource(tmp_path / "x.jsonl").describe().dims is None


def _size(folder: Path) -> int:
    return (folder / "x.jsonl").stat().st_size


def test_state_and_lifecycle_of_our_own_lines_leave_the_fields(tmp_path: Path) -> None:
    line = {**A, "state": "archived", "archived_at": "2026-01-01T00:00:00+00:00", "deleted_at": None, "expires_at": ""}
    (found,) = read(written(tmp_path / "x.jsonl", line))
    assert raw(found).data == {**A, "expires_at": ""}
    assert (raw(found).state, raw(found).lifecycle) == ("archived", {"archived_at": "2026-01-01T00:00:00+00:00"})
    (found,) = read(written(tmp_path / "x.jsonl", {**A, "state": "California"}))
    assert (raw(found).state, raw(found).data["state"]) == ("active", "California")


def test_items_without_an_id_get_the_same_one_every_time(tmp_path: Path) -> None:
    without = [{"memory": "x"}, {"memory": "y", "agent_id": "bot"}, {"memory": "x", "id": ""}]
    first = [raw(each).source_id for each in read(written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, without))))]
    again = [raw(each).source_id for each in read(written(tmp_path / "y.jsonl", "\n".join(map(json.dumps, without))))]
    assert first == again
    assert len(set(first)) == 3
    assert first[0].startswith("line 1 ")
    assert first[1].startswith("bot line 2 ")
    of_users = {"alice": [{"memory": "x"}], "bob": [{"memory": "x"}]}
    ids = [raw(each).source_id for each in read(written(tmp_path / "z.json", of_users))]
    assert ids[0].startswith("alice item 1 ")
    assert ids[1].startswith("bob item 1 ")


def test_items_without_an_id_of_two_files_do_not_meet(tmp_path: Path) -> None:
    first = written(tmp_path / "x.jsonl", {"memory": "tea", "user_id": "u"})
    other = written(tmp_path / "y.jsonl", {"memory": "rain", "user_id": "u"})
    assert raw(read(first)[0]).source_id != raw(read(other)[0]).source_id


def test_the_identity_is_of_the_content_and_not_of_the_path(tmp_path: Path) -> None:
    first = FileSource(written(tmp_path / "x.json", [A])).describe()
    assert first == FileSource(written(tmp_path / "y.json", [A])).describe()
    assert (first.name, first.size_bytes) == ("file", len(json.dumps([A])))
    other = FileSource(written(tmp_path / "x.json", [{**A, "memory": "sea"}])).describe()
    assert other.size_bytes == first.size_bytes
    assert other.identity != first.identity


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)
memories = st.lists(st.fixed_dictionaries({"metadata": st.dictionaries(texts, values), "memory": texts}), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(items=memories, chunk=st.integers(1, 64), escaped=st.booleans(), indent=st.sampled_from([None, 1]))
def test_any_json_is_cut_into_its_items_wherever_its_chunks_end(
    items: list[Any], chunk: int, escaped: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = [{"id": number, **each} for number, each in enumerate(items, 1)]
    path = written(tmp_path / "x.json", json.dumps({'u"}': numbered}, ensure_ascii=escaped, indent=indent))
    with monkeypatch.context() as patch:
        patch.setattr("memharbor.migrate.sources.json_stream.CHUNK_BYTES", chunk)
        found = read(path)
    assert [raw(each).data for each in found] == [{**each, "user_id": 'u"}'} for each in numbered]


def _lines(count: int) -> Iterable[str]:
    for number in range(count):
        yield json.dumps({"id": f"{number:08}", "memory": "x" * 250, "user_id": "u"})


@pytest.mark.parametrize("kind", ["lines", "users", "packed"])
def test_memory_stays_flat(kind: str, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        text = "\n".join(_lines(count)) if kind in ("lines", "packed") else f"[{','.join(_lines(count))}]"
        text = f'{{"u": {text}}}' if kind == "users" else text
        path = written(tmp_path / "x.json", gzip.compress(text.encode(), 1) if kind == "packed" else text)
        del text
        tracemalloc.start()
        try:
            assert sum(1 for _ in FileSource(path).read()) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Both files are larger than what is read at once.
    assert 2_000 * len(next(iter(_lines(1)))) > 2 * CHUNK_BYTES
    # Chunks and what Python keeps for itself; the items alone would be several times as much.
    assert peak(20_000) - peak(2_000) < 1_000_000
