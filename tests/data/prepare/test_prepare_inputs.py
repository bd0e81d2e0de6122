"""What `megaflow prepare` reads, and how it names what it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megaflow.data.prepare import readers
from megaflow.data.prepare.encode import PrepareOptions
from megaflow.data.prepare.prepare import prepare_corpus
from megaflow.errors import UserError
from megaflow.tools.cli import app
from tests.data.preparing import documents, texts, write_jsonl


def write_arrow(path: Path, written: list[str], rows: int) -> Path:
    """An Arrow stream as `datasets` writes it, `rows` rows to a batch."""
    table = pyarrow.table({"n": list(range(len(written))), "text": written})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)
    return path


def save_to_disk(folder: Path, parts: list[list[str]], **state: Any) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_arrow(folder / name, part, 4)
    data_files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": data_files, "_fingerprint": "5", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.arrow", "a.txt", "a.txt.zst"])
def test_input_formats_hold_the_same(
    tmp_path: Path, sp_model: Path, options: PrepareOptions, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 7)  # lines and frames are cut anywhere
    monkeypatch.setattr(readers, "PARQUET_ROWS", 3)
    written = [text.replace("\n", " ") for text in texts(20)]
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": list(range(20)), "text": written}), path)
    elif name == "a.arrow":
        write_arrow(path, written, 7)
    elif ".txt" in name:
        data = "\n".join(written).encode()
        halves = (data[:100], data[100:])  # two frames
        path.write_bytes(b"".join(map(zstandard.compress, halves)) if name.endswith("zst") else data)
    else:
        write_jsonl(path, [{"text": text} for text in written])
    prepare_corpus(tmp_path / "c", [path], replace(options, heldout=0.0, txt_per_line=True))
    assert sorted(documents(tmp_path / "c", sp_model)) == sorted(written)
    assert not (tmp_path / "c.heldout.json").exists()


def test_a_txt_file_is_a_document(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three")
    prepare_corpus(tmp_path / "c", [tmp_path / "a.txt", tmp_path / "b.txt"], replace(options, heldout=0.0))
    assert sorted(documents(tmp_path / "c", sp_model)) == ["one\n\ntwo\n", "three"]


def test_lines_of_windows_are_those_of_others(tmp_path: Path, sp_model: Path, options: PrepareOptions) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo \rthree\r\n")
    prepare_corpus(tmp_path / "c", [tmp_path / "a.txt"], replace(options, heldout=0.0, txt_per_line=True))
    assert sorted(documents(tmp_path / "c", sp_model)) == ["one", "two \rthree"]


def test_pairs_are_not_read_from_text_but_from_what_is_called_alike(tmp_path: Path, sp_model: Path) -> None:
    pairs = write_jsonl(tmp_path / "a.txt.jsonl", [{"en": f"{i} one", "zh": f"{i} two"} for i in range(9)])
    command = ["--tokenizer", str(sp_model), "--language", "en-zh", "--kind", "parallel", "--seq-length", "64"]
    app(["prepare", str(tmp_path / "c"), str(pairs), "--workers", "1", *command], standalone_mode=False)
    for name in ("a.txt", "a.TXT.zst"):
        with pytest.raises(UserError, match=r"several fields, which \.txt has not"):
            app(["prepare", str(tmp_path / "d"), str(tmp_path / name), *command], standalone_mode=False)


BAD = [
    (b"{", "not JSON"),
    (b"[1]", "not a JSON object"),
    (b"[" * 100_000, "not JSON"),
    (b"\xff", "not UTF-8"),
    (b'{"txt": "a"}', "no field text"),
    (b'{"text": 5}', "field text is not a string"),
    (b'{"text": " "}', "field text is empty"),
    (b'{"text": "\\ud800"}', "field text holds half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_lines_are_counted_and_named(
    tmp_path: Path, options: PrepareOptions, line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)  # lines are counted over chunks
    good = [json.dumps({"text": text}).encode() for text in texts(99)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:40], line, *good[40:]]))
    report = prepare_corpus(tmp_path / "c", [path], options)
    assert report.bad == [f"{path}:41: {reason}"]
    assert report.manifest is not None
    assert report.manifest.bad_records == 1
    path.write_bytes(b"\n".join([line, *good[:50], line, *good[50:98]]))
    with pytest.raises(UserError, match=r"2 of 100 records.*--max-bad 0\.01") as caught:
        prepare_corpus(tmp_path / "d", [path], options)
    assert f"{path}:1: {reason}" in str(caught.value)
    assert [found.name for found in tmp_path.glob("*d.*")] == [".tmp-d.work"]  # for a greater --max-bad
    assert prepare_corpus(tmp_path / "d", [path], replace(options, max_bad=0.02)).num_bad == 2
    assert not list(tmp_path.glob(".tmp-*"))


def cut_zst(path: Path) -> Path:
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n' * 50)[:-3])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent.jsonl", "no such file"),
        (lambda d: d, "is a folder"),
        (lambda d: write_jsonl(d / "a.csv", []), "unknown kind of file"),
        (lambda d: write_jsonl(d / "a.zst", []), "unknown kind of file"),
        (lambda d: cut_zst(d / "a.jsonl.zst"), "cut short"),
        (lambda d: Path(write_jsonl(d / "a.jsonl", [1])).rename(d / "b.jsonl.zst"), "not valid zstd"),
        (lambda d: write_jsonl(d / "a.parquet", [1]), "cannot be read as Parquet"),
        (lambda d: write_jsonl(d / "empty.jsonl", []), "no documents"),
    ],
)
def test_wrong_inputs_are_named(
    tmp_path: Path, options: PrepareOptions, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(tmp_path / "c", [path], options)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("c", ".tmp-"))]


def test_parquet_without_the_column(tmp_path: Path, options: PrepareOptions) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column text; it has n"):
        prepare_corpus(tmp_path / "c", [tmp_path / "a.parquet"], options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_blank_lines_are_no_records(tmp_path: Path, options: PrepareOptions, name: str) -> None:
    lines = [(json.dumps({"text": text}) if name == "a.jsonl" else text.replace("\n", " ")) for text in texts(20)]
    (tmp_path / name).write_text("\n\n  \r\n".join(lines) + "\n\t\n")
    report = prepare_corpus(tmp_path / "c", [tmp_path / name], replace(options, heldout=0.0, txt_per_line=True))
    assert (report.records, report.num_bad) == (20, 0)
    (tmp_path / name).write_text("\n\n".join([*lines, "{" if name == "a.jsonl" else "\u3000"]))
    report = prepare_corpus(tmp_path / "d", [tmp_path / name], replace(options, max_bad=0.1, txt_per_line=True))
    assert report.num_bad == 1
    assert report.bad[0].startswith(f"{tmp_path / name}:41: ")  # lines are counted with the blank ones


def test_folders_stand_for_their_files(
    tmp_path: Path, sp_model: Path, options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the data set, or of the names; what else is in the folder is not read."""
    monkeypatch.setattr(readers, "PARQUET_ROWS", 3)
    written = texts(60)
    saved = save_to_disk(tmp_path / "saved", [written[:10], written[10:12], written[12:20]])
    (saved / "data-00009-of-00009.arrow").write_bytes(b"of another time")
    tables, lines = tmp_path / "tables", tmp_path / "lines"
    for folder in (tables, lines):
        (folder / "deeper").mkdir(parents=True)
        (folder / "README.md").touch()
    for name, part in (("b", written[30:40]), ("a", written[20:30])):
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), tables / f"{name}.parquet")
    write_jsonl(lines / "2.jsonl.zst", [{"text": text} for text in written[50:]])
    write_jsonl(lines / "1.jsonl", [{"text": text} for text in written[40:50]])
    prepare_corpus(tmp_path / "c", [saved, tables, lines], options)
    prepare_corpus(tmp_path / "d", [write_jsonl(tmp_path / "all.jsonl", [{"text": text} for text in written])], options)
    for suffix in ("bin", "idx", "heldout.bin", "heldout.idx"):
        assert (tmp_path / f"c.{suffix}").read_bytes() == (tmp_path / f"d.{suffix}").read_bytes()


def splits(folder: Path) -> Path:
    for name in ("train", "test"):
        save_to_disk(folder / name, [["a"]])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def with_state(folder: Path, state: str) -> Path:
    save_to_disk(folder, [["a"]])
    (folder / "state.json").write_text(state)
    return folder


def cut_arrow(folder: Path, end: int, rows: int = 1) -> Path:
    path = write_arrow(folder / "a.arrow", ["a"] * 50, rows)
    path.write_bytes(path.read_bytes()[:end])
    return path


def mixed(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a.jsonl", "a.parquet"):
        (folder / name).touch()
    return folder


def without_file(folder: Path) -> Path:
    save_to_disk(folder, [["a"], ["b"]])
    (folder / "data-00001-of-00002.arrow").unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: splits(d / "s"), r"several splits; give those to use: .*/s/train, .*/s/test$"),
        (lambda d: save_to_disk(d / "s", [["a"]], _indices_files=[{"filename": "i.arrow"}]), r"flatten_indices\(\)"),
        (lambda d: with_state(d / "s", "{"), r"state\.json: cannot be read"),
        (lambda d: with_state(d / "s", "[]"), r"state\.json: not a JSON object"),
        (lambda d: with_state(d / "s", "{}"), r"state\.json: names no data files"),
        (lambda d: with_state(d / "s", '{"_data_files": [1]}'), r"state\.json: names no data files"),
        (lambda d: with_state(d / "s", '{"_data_files": []}'), "no documents to train on"),
        (lambda d: without_file(d / "s"), r"data-00001-of-00002\.arrow: no such file"),
        (lambda d: mixed(d / "s"), "both .parquet and .jsonl"),
        (lambda d: cut_arrow(d, -8), r"a\.arrow: the Arrow stream has no end; the file was cut short"),
        (lambda d: cut_arrow(d, -20), r"a\.arrow: "),
        (lambda d: cut_arrow(d, 100), r"a\.arrow: cannot be read as an Arrow stream"),
        (lambda d: cut_arrow(d, 0), r"a\.arrow: cannot be read as an Arrow stream"),
        (lambda d: write_jsonl(d / "a.arrow", [{"text": "a"}]), r"a\.arrow: cannot be read as an Arrow stream"),
    ],
)
def test_wrong_data_sets_are_named(
    tmp_path: Path, options: PrepareOptions, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(tmp_path / "c", [path], options)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(("c", ".tmp-"))]


def test_a_data_set_without_the_column(tmp_path: Path, options: PrepareOptions) -> None:
    folder = save_to_disk(tmp_path / "s", [["a"]])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: no column body; it has n, text"):
        prepare_corpus(tmp_path / "c", [folder], replace(options, format=replace(options.format, fields=("body",))))
