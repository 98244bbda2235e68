"""The page: everything measured is in it, nothing outside is needed, the best is marked, and no row can break it."""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import MISSING
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

import report_rows as rows_of
from colours import contrast
from qjl import cli, presets
from qjl.errors import QJLError
from qjl.lab import report, results
from qjl.lab.plots.answers import by_metric
from qjl.lab.plots.style import INK, OURS, TONES
from qjl.lab.report import numbers
from qjl.lab.report.kinds import KINDS
from qjl.lab.report.numbers import MINUS, NOTHING
from report_rows import EVERY_KIND, typed

VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's elements, and whether each is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.text = [], Counter(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(*rows):
    return report.page([report.run("rows.jsonl", list(rows))])


def part_of(kind, *rows):
    (section,) = report.sections(typed(*rows))
    assert section.name == kind
    (part,) = section.parts
    return part


def cells(table, column):
    """Of one column, by the name of the line: text and mark."""
    index = table.columns.index(column)
    return {line[0].text: (line[index].text, line[index].mark) for line in table.lines}


@pytest.fixture(scope="module")
def text():
    return page_of(*(row for rows in EVERY_KIND.values() for row in rows))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


# The page


def test_every_kind_has_a_sample_here():
    assert EVERY_KIND.keys() == KINDS.keys()


def test_every_element_is_closed_and_every_id_is_one(text, page):
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert max(Counter(page.ids).values()) == 1


def test_it_opens_with_the_frontier_and_has_a_section_of_every_kind(page):
    assert [name for name in page.ids if name in KINDS] == list(KINDS)
    drawn = len(KINDS) - 3  # families, overheads and kernels that did not run have none
    assert page.tags["svg"] == page.tags["figure"] == page.tags["figcaption"] == drawn
    assert page.tags["table"] == page.tags["caption"] == len(KINDS) + 2  # the headline, and the sources
    assert page.tags["h1"] == 1


def test_nothing_outside_is_needed(text, page):
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "aria-labelledby")]
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    assert "url(http" not in text
    assert "@import" not in text
    addresses = [(name, value) for name, value in page.attributes if value and "//" in value]
    assert {name for name, _ in addresses} <= {"xmlns", "xmlns:xlink"}


def test_the_same_rows_give_the_same_page(text):
    assert page_of(*(row for rows in EVERY_KIND.values() for row in rows)) == text


def test_what_rows_say_is_escaped():
    evil = '</title><script>alert("1")</script> --> $x'
    rows = [
        row | dict.fromkeys({"preset", "model", "machine"} & row.keys(), evil)
        for rows in EVERY_KIND.values()
        for row in rows
    ]
    rows += [{"case": evil}]
    page = Page(page_of(*rows))
    assert page.open == []
    assert page.tags["script"] == 0
    assert any(evil in text for text in page.text)


def test_rows_of_other_kinds_are_told_at_the_end():
    page = Page(page_of(*EVERY_KIND["seeds"], {"case": "survey"}, {"case": "survey"}, {"x": 1}))
    assert [text for text in page.text if text in ("survey: 2", "of no kind: 1")] == ["of no kind: 1", "survey: 2"]


def test_configuration_versions_and_machine_are_told():
    page = " ".join(Page(page_of(*EVERY_KIND["decode"], *EVERY_KIND["seeds"])).text)
    for words in ("qjl 0.1.0, torch 2.13.0", "a machine", "cpu (avx2)", "prefix 256; decode 128", '"num_bits": 3'):
        assert words in page


def test_what_cannot_be_compared_stands_apart():
    other = [row | {"model": "other"} for row in EVERY_KIND["frontier"]]
    (section,) = report.sections(typed(*EVERY_KIND["frontier"], *other))
    assert [part.title for part in section.parts] == ["tiny", "other"]


def test_of_several_measurements_the_last_counts():
    part = part_of("frontier", rows_of.frontier("b3", 0.5), rows_of.frontier("b3", 0.010))
    assert cells(part.tables[-1], "KL, nats") == {"b3": ("0.0100 ± 0.0010", "best")}


def test_words_can_be_read_by_day_and_by_night(text):
    day, night = re.findall(r":root {([^}]*)}", text)
    for theme in (day, night):
        colours = dict(re.findall(r"--(\w+): (#\w+)", theme))
        assert min(contrast(colours[name], colours["ground"]) for name in ("ink", "soft", "accent")) >= 4.5
        assert min(contrast(tone, colours["ground"]) for tone in (OURS, *TONES)) >= 3
    assert INK not in text


# Marks


def test_the_best_of_each_size_is_marked_and_what_is_as_good():
    rows = [rows_of.frontier("full", 0.0, None), rows_of.frontier("b2", 0.0305), rows_of.frontier("b3", 0.010)]
    rows += [rows_of.frontier("kivi-2", 0.0125), rows_of.frontier("kivi-2", 0.033) | {"preset": "kivi-1", "bits": 2.0}]
    headline, every = part_of("frontier", *rows).tables
    assert headline.columns == ("method", "≤ 2.25 bits", "≤ 2.75 bits", "≤ 3.25 bits")
    marks = [[mark for _, mark in cells(headline, column).values()] for column in headline.columns[1:]]
    assert marks == [["best", "near"], ["best", ""], ["best", "near"]]
    assert cells(every, "KL, nats")["full"] == ("0", "best")
    assert cells(every, "KL, nats")["kivi-2"][1] == ""


def test_losses_are_compared_stretch_by_stretch():
    """A fifth more on every stretch is told apart, however much stretches differ."""
    easy_to_hard = [0.01, 0.02, 0.04, 0.03]
    best, worse = (
        rows_of.frontier(name, factor * 0.025, 0.006) | {"kl_of_chunks": [factor * one for one in easy_to_hard]}
        for name, factor in (("b3", 1.0), ("kivi-2", 1.2))
    )
    mixed = worse | {"kl_of_chunks": [0.012, 0.018, 0.05, 0.04]}
    unpaired, shorter = (worse | {"kl_of_chunks": known} for known in (None, [0.012]))
    worse["kl_of_chunks"][0] *= 1.01
    for other, mark in ((worse, ""), (mixed, "near"), (unpaired, "near"), (shorter, "near")):
        (_, worst) = cells(part_of("frontier", best, other).tables[0], "≤ 3.25 bits").values()
        assert worst[1] == mark


def test_problems_are_compared_one_by_one():
    part = part_of("problems", *EVERY_KIND["problems"], rows_of.problems("b2", "1100"))
    assert cells(part.tables[0], "difference to full") == {
        "full": ("", ""),
        "b3": ("0", ""),
        "b2": (MINUS + "25 ± 25", ""),
        "kivi-2": (MINUS + "50 ± 29", ""),
    }


def test_what_errs_alike_can_be_told_apart_by_pairs():
    """Independent errors of 5 % each would hide 10 %; every one of these was lost by the same cache."""
    best, worse = "1" * 60 + "0" * 40, "1" * 50 + "0" * 50
    part = part_of("problems", *(rows_of.problems(name, right) for name, right in (("b3", best), ("b2", worse))))
    assert numbers.is_near((60.0, 4.9), (50.0, 5.0))
    assert {name: mark for name, (_, mark) in cells(part.tables[0], "solved, %").items()} == {"b2": "", "b3": "best"}


def test_full_precision_does_not_compete():
    part = part_of("harness", *EVERY_KIND["harness"])
    assert [mark for _, mark in cells(part.tables[0], "piqa, acc").values()] == ["", "", "best"]  # full, b2, b3


def test_of_perplexities_the_lower_is_the_better():
    rows = [rows_of.harness(name, "wiki", "word_perplexity", value) for name, value in (("b3", 20.0), ("b2", 22.0))]
    assert cells(part_of("harness", *rows).tables[0], "wiki, word_perplexity")["b3"][1] == "best"


@pytest.mark.parametrize(("metric", "best"), [("brier_score", "b3"), ("loss", "b3"), ("gloss", "b2"), ("acc", "b2")])
def test_which_metrics_are_better_when_lower(metric, best):
    rows = [rows_of.harness(name, "task", metric, value) for name, value in (("b3", 0.1), ("b2", 0.9))]
    marks = {name: mark for name, (_, mark) in cells(part_of("harness", *rows).tables[0], f"task, {metric}").items()}
    assert marks == {"b3": "", "b2": "", best: "best"}


def test_perplexities_are_compared_by_their_logarithms():
    found = (("b3", 72.0, 32.0), ("b2", 74.0, 34.0), ("kivi-2", 68064.0, 147213.0))
    rows = [rows_of.harness(name, "lambada", "perplexity", value, error) for name, value, error in found]
    marks = {
        name: mark for name, (_, mark) in cells(part_of("harness", *rows).tables[0], "lambada, perplexity").items()
    }
    assert marks == {"b3": "best", "b2": "near", "kivi-2": ""}


def test_caches_are_compared_by_the_most_tokens_that_any_of_their_batches_gave():
    rows = [rows_of.throughput("dynamic", 4), rows_of.throughput("b3", 2) | {"tokens_per_second": 900.0}]
    (table,) = part_of("throughput", *rows, rows_of.throughput("b3", 8, True)).tables
    assert cells(table, "tokens/s")["b3"] == ("800", "")
    assert cells(table, "most tokens/s") == {"b3": ("900", "best"), "dynamic": ("400", "")}
    assert cells(table, "of sequences")["b3"][0] == "2"
    assert cells(table, "x dynamic")["b3"][0] == "2.25"


def test_many_engines_are_told_line_by_line():
    names = ("onnx_int8", "openvino_u8", "llama_f16", "torch_fp32", "fp16_avx2")
    more = {f"{what}_{name}": value for name in names for what, value in (("ms", 3.0), ("ratio", 1.5))}
    few, many = (part_of("decode", rows_of.decode("b3", 1024, 2.0) | fields) for fields in ({}, more))
    assert len(few.tables) == 1
    assert "x torch bf16" in few.tables[0].columns
    ours, others = many.tables
    assert not [column for column in ours.columns if column.startswith("x ")]
    assert [line[1].text for line in others.lines] == ["torch bf16", *(name.replace("_", " ") for name in names)]
    assert [cell.text for cell in others.lines[1]] == ["b3", "onnx int8", "1,024", "3.00", "1.50"]


def test_one_round_has_no_quartiles():
    rows = [rows_of.memory("b3", 256, 10.0) | {"repeats": repeats} for repeats in (1, 2)]
    notes = [part_of("memory", row).tables[0].lines[0][4].note for row in rows]
    assert notes == ["", "1.40 to 1.60"]


def test_needles_are_compared_with_full_precision_cell_by_cell():
    (table,) = part_of("haystack", *EVERY_KIND["haystack"]).tables
    notes = {line[0].text: line[table.columns.index("needle, 4 haystacks")].note for line in table.lines}
    assert notes == {"full": "", "b3": "0", "kivi-2": MINUS + "50.0"}


def test_few_haystacks_tell_little_apart():
    shares = {"b3": (1, 1, 1, 1), "b2": (1, 0, 0, 1), "kivi-2": (0, 0, 0, 0)}
    rows = [
        rows_of.haystack(name, context, depth, found)
        for name, of in shares.items()
        for (context, depth), found in zip(((c, d) for c in (1024, 2048) for d in (0.25, 0.75)), of, strict=True)
    ]
    (table,) = part_of("haystack", *rows).tables
    assert [mark for _, mark in cells(table, "needle, 4 haystacks").values()] == ["near", "best", "near"]
    assert not any(
        mark
        for _, mark in cells(
            part_of("haystack", *rows[:4], *EVERY_KIND["haystack"][:4]).tables[0], table.columns[2]
        ).values()
    )


@pytest.mark.parametrize(
    ("differences", "apart"),
    [
        ([], True),
        ([1.0], False),
        ([1.0] * 5, False),
        ([1.0] * 6, True),
        ([0.0] * 9, False),
        ([1.0, 1.2], False),
        ([1.0, 1.1], True),
        ([2.0, 1.0, 3.0, 0.6], False),
        ([2.0, 1.0, 3.0, 0.9], True),
        ([0.0] * 12 + [1.0] * 4, True),
        ([0.0] * 12 + [1.0] * 3, False),
    ],
)
def test_pairs_are_judged_by_student_s_t(differences, apart):
    assert numbers.are_apart(differences) is apart


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.71), (9, 2.262), (10, 2.228), (30, 2.042), (199, 1.972)])
def test_student_s_quantiles(freedom, quantile):
    assert numbers._student(freedom) == pytest.approx(quantile, abs=5e-3)


def test_each_filter_has_a_column_and_a_panel():
    rows = [
        rows_of.harness(name, "gsm8k", "exact_match", value) | {"filter": chosen}
        for name in ("b3", "b2")
        for chosen, value in (("strict", 0.2), ("flexible", 0.3))
    ]
    (table,) = part_of("harness", *rows).tables
    assert table.columns[2:4] == ("gsm8k, exact_match, strict", "gsm8k, exact_match, flexible")
    assert {key: len(of) for key, of in by_metric(typed(*rows)).items()} == {
        ("gsm8k", "exact_match, strict"): 2,
        ("gsm8k", "exact_match, flexible"): 2,
    }


def test_a_preset_with_two_windows_hides_neither():
    rows = [rows_of.perplexity(name, 512, ppl) for name, ppl in (("b3", 20.2), ("kivi-2", 22.0))]
    (section,) = report.sections(typed(*rows, rows[0] | {"recent": 0, "ppl": 20.9}))
    assert [[line[0].text for line in part.tables[0].lines] for part in section.parts] == [["b3", "kivi-2"], ["b3"]]


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.06470, 0.00441, "0.0647 ± 0.0044"),
        (1.8049, 0.1205, "1.80 ± 0.12"),
        (-12.34, 3.5, MINUS + "12.3 ± 3.5"),
        (36450.6, 120.0, "36,451 ± 120"),
        (0.0123456, None, "0.0123"),
        (0.5, 0.0, "0.500"),
        (0.0, 0.0, "0"),
        (float("nan"), None, NOTHING),
        (None, None, NOTHING),
    ],
)
def test_digits_say_something(value, error, shown):
    assert numbers.with_error(value, error) == shown


def test_without_errors_nothing_is_as_good():
    assert numbers.marks([(1.0, None), (1.1, None), None, (1.0, None)], higher=False) == ["best", "", "", "best"]
    assert numbers.marks([(1.0, 0.1)], higher=True) == [""]
    assert numbers.marks([(0.0, None), (0.0, None)], higher=True) == ["", ""]


# Commands


def test_a_part_tells_each_command_that_measured_it():
    """As lines that a shell reads: what is too long for one goes on after a backslash."""
    long = "qjl eval seeds --data 'a text.txt'" + " --preset b3" * 12
    commands = (long, long, "qjl eval seeds")
    rows = [row | {"command": one} for row, one in zip(EVERY_KIND["seeds"], commands, strict=True)]
    part = part_of("seeds", *rows)
    assert part.command.replace(" \\\n ", "").split("\n") == [long, "qjl eval seeds"]
    assert max(map(len, part.command.splitlines())) < 100


def test_a_row_without_a_command_has_none():
    assert part_of("seeds", *EVERY_KIND["seeds"]).command == ""


def test_settings_of_a_preset_give_it_again():
    part = part_of("frontier", rows_of.frontier("b3", 0.01) | {"preset": "mine"})
    assert presets.from_dict(json.loads(part.settings["mine"])).recent == 32


# Reading, and the command


@pytest.fixture
def folder(tmp_path):
    for name in ("seeds", "decode"):
        for row in EVERY_KIND[name]:
            results.append(tmp_path / f"{name}.jsonl", row)
    results.append(tmp_path / "seeds.answers.jsonl", {"run": "a", "request": "b", "answer": []})
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def test_a_folder_is_all_of_its_files_but_the_kept_answers(folder):
    assert [found.name for found in report.read([folder, folder / "seeds.jsonl"])] == ["decode.jsonl", "seeds.jsonl"]


def test_the_command_writes_the_page_and_says_what_is_in_it(folder):
    output = folder / "page.html"
    result = run(folder, "-o", output)
    assert (result.exit_code, result.stdout.split()[:5]) == (0, ["5", "measurements", "in", "2", "sections"])
    assert output.read_text() == report.page(report.read([folder]))
    (line,) = run(folder, "-o", output, "--json").stdout.splitlines()
    told = {"output": str(output), "bytes": output.stat().st_size, "sections": {"seeds": 3, "decode": 2}, "others": {}}
    assert json.loads(line) == told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no "),
        ("", None, "holds no measurements"),
        ("empty.jsonl", "", "nothing was measured in empty.jsonl"),
        ("other.jsonl", '{"case": "survey"}\n', "nothing was measured in other.jsonl"),
        ("broken.jsonl", "{\n{}\n", "cannot read "),
        ("old.jsonl", '{"case": "seeds", "model": "a"}\n', "a row of seeds in old.jsonl has no preset"),
    ],
)
def test_what_cannot_be_reported_is_refused(name, content, message, tmp_path, refuses):
    if content is not None:
        (tmp_path / name).write_text(content)
    with refuses(message):
        report.read([tmp_path / name])


@pytest.mark.parametrize("name", ["page.pdf", "none/page.html", ""])
def test_a_page_that_cannot_be_written_is_refused(name, folder):
    result = run(folder, "-o", folder / name)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_damaged_row_is_shown_or_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(b'<svg width="9pt"></svg>'))
    path = tmp_path / "rows.jsonl"
    first, *others = EVERY_KIND[kind]
    fields = dataclasses.fields(KINDS[kind].type)
    needs = {one.name for one in fields if one.default is MISSING and one.default_factory is MISSING}
    refused = set()
    for field in first.keys() - {"case"}:
        rest = {name: value for name, value in first.items() if name != field}
        for damaged in (rest, *(rest | {field: wrong} for wrong in (None, "?", 3, -0.5, [1], {"a": 1}))):
            path.write_text("".join(json.dumps(row) + "\n" for row in (damaged, *others)))
            if message := refusal(path):
                assert f"row of {kind} in rows.jsonl has " in message
                assert field in message
                assert field in damaged or field in needs
                refused.add(field)
    assert needs <= refused


def refusal(path):
    try:
        report.page(report.read([path]))
    except QJLError as error:
        return str(error)
    return None


def test_predictions_are_called_so():
    table = part_of("static", *EVERY_KIND["static"]).tables[0]
    assert table.columns[-2:] == ("predicted cycles", "predicted x bf16")
    assert table.caption.startswith("H100 (9.0), 3 x 3 heads of 64.")
    assert "The model does not know it." in table.caption
    assert "no loop" not in table.caption
    walks, joins, unknown = table.lines
    assert [(cell.text, cell.note) for cell in walks[-2:]] == [("9.00", "8.00 to 11.0"), ("2.10", "1.70 to 2.40")]
    assert {cell.text for cell in (*joins[-2:], unknown[-2])} == {"\N{EN DASH}"}
