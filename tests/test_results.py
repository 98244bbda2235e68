"""Rows in files: appended whole, read again after an interruption, and the best of them found."""

import json
from dataclasses import replace

import pytest

from qjl.cli.common import require_writable
from qjl.lab import results, rows
from report_rows import frontier, typed

ROWS = [{"preset": "b2", "kl": 0.03}, {"preset": "b3", "kl": 0.02}]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        results.append(path, row)
    return path


def test_what_was_appended_is_read(path):
    assert results.read(path) == results.resume(path) == ROWS
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS


def test_no_file_has_no_rows(tmp_path):
    path = tmp_path / "none.jsonl"
    assert results.read(path) == results.resume(path) == []
    assert not path.exists()


@pytest.mark.parametrize("half", [b'{"preset": "b4", "k', b'{"preset": "b4"', b"{", '{"ä'.encode()[:-1]])
def test_a_half_line_is_dropped(half, path):
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert results.resume(path) == ROWS
    assert path.read_bytes() == whole


def test_a_whole_row_counts_without_its_newline(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert results.read(path) == ROWS
    assert path.read_bytes() == whole[:-1]
    assert results.resume(path) == ROWS
    assert path.read_bytes() == whole


@pytest.mark.parametrize("end", ["The end", "[1, 2]", "12"])
def test_what_no_killed_run_leaves_is_not_cut_off(end, path, refuses):
    path.write_text(path.read_text() + end)
    before = path.read_text()
    with refuses("line 3 is no object"):
        results.resume(path)
    assert path.read_text() == before


def test_rows_follow_a_half_line(path):
    path.write_bytes(path.read_bytes()[:-5])
    results.resume(path)
    results.append(path, ROWS[1])
    assert results.read(path) == ROWS


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"preset": "b2"'])
def test_a_broken_line_in_the_middle_is_refused(line, path, refuses):
    path.write_text(f"\n{line}\n{path.read_text()}")
    before = path.read_text()
    with refuses(f"cannot read {path} as JSON lines, for line 2 is no object"):
        results.resume(path)
    assert path.read_text() == before


def test_looking_whether_a_file_can_be_written_leaves_none(tmp_path, path, refuses):
    before = path.read_text()
    require_writable(path)
    assert path.read_text() == before
    require_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with refuses("cannot write to"):
        require_writable(tmp_path / "none" / "new")


def test_the_front_is_what_no_other_beats():
    (row,) = typed(frontier("b3", 1.0))
    named = [("d", 4, 0.01), ("c", 3, 0.2), ("a", 1, 1.0), ("b", 2, 0.1), ("worse", 2, 0.3)]
    found = [replace(row, preset=name, bits=bits, kl=kl) for name, bits, kl in named]
    assert [row.preset for row in rows.pareto_front(found)] == ["a", "b", "d"]


def test_a_journal_keeps_answers_by_run(tmp_path):
    path, run = tmp_path / "answers.jsonl", {"preset": "b2", "seed": 0}
    journal = results.Journal(path, run)
    assert [journal.answer([1, "a"], lambda: [0.1, None]) for _ in range(2)] == [[0.1, None]] * 2
    with path.open("a") as file:
        file.write('{"run": "half a li')
    again = results.Journal(path, {"seed": 0, "preset": "b2"})
    assert ([1, "a"] in again, [2, "a"] in again) == (True, False)
    assert again.answer([1, "a"], lambda: "asked again") == [0.1, None]
    assert again.answer([2, "a"], lambda: "another") == "another"
    assert results.Journal(path, {"preset": "b3", "seed": 0}).answer([1, "a"], lambda: "another run") == "another run"
    assert [row["answer"] for row in results.read(path)] == [[0.1, None], "another", "another run"]


def test_a_journal_without_a_file_forgets():
    assert results.Journal().answer("a", lambda: 1) == 1
    assert results.Journal().answer("a", lambda: 2) == 2
