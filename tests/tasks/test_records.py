import bz2
import gzip
import json

import pytest

from tensorpeft.tasks.records import Record, read_json, read_json_object, read_lines, read_text, read_tsv

ROWS = [
    {"text": "one\ntwo", "parts": [{"a": 1}, {"a": 2}]},
    {"text": 'a "quoted" ] , [ { word', "parts": []},
    {"text": "line\u2028paragraph\u2029next\x85é", "parts": [[]]},
]
# Text to Python's splitlines(), line ends to it only.
SEPARATORS = "\u2028\u2029\x85\x1c\x0b\x0c"


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(folder, name, data, reader=read_json):
    return [(record.place.rpartition("line ")[2], record.fields) for record in reader(write(folder, name, data))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", [1, 4])
def test_a_row_of_a_pretty_printed_list_knows_the_line_that_it_begins_in(tmp_path, indent, end):
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False).replace("\n", end) + end
    starts = [number for number, line in enumerate(text.split(end), 1) if line == " " * indent + "{"]
    assert read(tmp_path, "a.json", text) == list(zip(map(str, starts), ROWS, strict=True))


def test_rows_that_share_a_line_and_empty_lines_between_rows(tmp_path):
    text = '\n[ {"a": 1},\n\n\t{"a": 2} , {"a": 3}\n,\n{"a":\n4}]\n\n'
    assert read(tmp_path, "a.json", text) == [("2", {"a": 1}), ("4", {"a": 2}), ("4", {"a": 3}), ("6", {"a": 4})]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_json_lines(tmp_path, end, last):
    text = end.join(json.dumps(row, ensure_ascii=False) for row in ROWS) + end * last
    assert read(tmp_path, "a.jsonl", text) == [("1", ROWS[0]), ("2", ROWS[1]), ("3", ROWS[2])]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_compressed_files(tmp_path, name, ending, compress):
    text = json.dumps(ROWS) if name == "a.json" else "\n".join(map(json.dumps, ROWS))
    assert [row for _, row in read(tmp_path, f"{name}.{ending}", compress(text.encode()))] == ROWS


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_damaged_file_is_an_error_and_never_other_rows(tmp_path, ending, compress):
    rows = [{"text": f"row {number}"} for number in range(20)]
    whole = compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    flipped = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    assert [row for _, row in read(tmp_path, f"a.jsonl.{ending}", whole)] == rows
    for damaged in [whole[:length] for length in range(len(whole))] + flipped:
        try:
            found = [row for _, row in read(tmp_path, f"a.jsonl.{ending}", damaged)]
        except ValueError as error:
            found = str(error)
        # Rows: what was flipped is no content, such as the time in the header.
        assert found == rows or f"a.jsonl.{ending}" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: got '', expected \["),
        ("\n\n", r"line 3: got '', expected \["),
        ('{"a": 1}', r"line 1: got '{', expected \["),
        ("[", r"line 1: not JSON \(Expecting value, column 2\)"),
        ('[\n{"a": 1}\n', r"line 3: got '', expected , or \]"),
        ('[\n{"a": 1},\n', r"line 3: not JSON"),
        ('[\n{"a": 1},\n]', r"line 3: not JSON"),
        ('[\n{"a": 1}\n{"a": 2}]', r"line 3: got '{', expected , or \]"),
        ('[\n,{"a": 1}]', r"line 2: not JSON"),
        ('[{"a": 1},\n\n3]', r"line 3: got 3, expected an object with fields"),
        ('[{"a": 1},\n[{"a": 2}]]', r"line 2: got \[{'a': 2}\], expected an object"),
        ('[{"a": 1},\n{"a":\n\n"x}]', r"line 4: not JSON \(Unterminated string"),
        ('[{"a": 1},\n{"a": "x\ny"}]', r"line 2: not JSON \(Invalid control character"),
        ('[{"a": 1},\n{"a": 2\n\n]', r"line 4: not JSON"),
        ('[{"a": 1}]\n\n[{"a": 2}]\n', r"line 3: got '\[{\"a\": 2}\]\\n' after the end of the JSON list"),
        ('[{"a": 1}] // end', r"line 1: got '// end' after the end"),
        ("[] x", r"line 1: got 'x' after the end"),
        ('[{"a": 1}\ufeff]', r"line 1: got '\\ufeff', expected , or \]"),
        ('[\n{"a": ' + "9" * 5000 + "}]", r"line 2: not JSON \(Exceeds the limit"),
        ('[\n{"a": ' + "[" * 100_000, r"line 2: not JSON \(maximum recursion depth"),
    ],
)
def test_a_malformed_list_names_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"a\.json, {message}"):
        read(tmp_path, "a.json", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: not JSON \(Expecting value, column 1\)"),
        ('{"a": 1}\n\n{"a": 2}\n', r"line 2: not JSON"),
        ('{"a": 1}\n\n', r"line 2: not JSON"),
        ('{"a": 1}\n  \n', r"line 2: not JSON"),
        ('{"a": 1}\n{"a": 2} {"a": 3}', r"line 2: not JSON \(Extra data, column 10\)\. Expected one object per line"),
        ('{"a": 1}\r{"a": 2}\r', r"line 1: not JSON \(Extra data"),
        ('{"a": 1}\n[{"a": 2}]', r"line 2: got \[{'a': 2}\], expected an object"),
        ('{"a": 1}\nnull', r"line 2: got None, expected an object"),
        ('{"a": 1}\n{"a": ' + "[" * 100_000, r"line 2: not JSON \(maximum recursion depth"),
    ],
)
def test_malformed_json_lines_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        read(tmp_path, "a.jsonl", text)


def test_a_file_that_is_one_object(tmp_path):
    assert read_json_object(write(tmp_path, "a.json", '\n{"a":\n1}\n')).fields == {"a": 1}
    for text, message in [('{"a":\n}', "line 2: not JSON"), ("[1]", r"got \[1\]"), ("[" * 100_000, "line 1: not JSON")]:
        with pytest.raises(ValueError, match=message):
            read_json_object(write(tmp_path, "a.json", text))


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = f"a\rb{SEPARATORS}\r\nc\r\r\n\nd"
    lines = [line for _, line in read_lines(write(tmp_path, "a.txt", text))]
    assert lines == [f"a\rb{SEPARATORS}", "c\r", "", "d"]
    assert [line for _, line in read_lines(write(tmp_path, "a.txt", text + "\n"))] == lines


def test_a_byte_order_mark_is_dropped_at_the_beginning_only(tmp_path):
    assert read_text(write(tmp_path, "a.txt", "\ufeffa\ufeff")) == "a\ufeff"
    assert read_text(write(tmp_path, "a.gz", gzip.compress("\ufeffa".encode()))) == "a"
    assert read(tmp_path, "a.json", '\ufeff[{"a": 1}]') == [("1", {"a": 1})]
    assert read(tmp_path, "a.jsonl", '\ufeff{"a": 1}') == [("1", {"a": 1})]
    assert read(tmp_path, "a.tsv", "\ufeffa\tb\n\ufeff1\t2", read_tsv) == [("2", {"a": "\ufeff1", "b": "2"})]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fields_separated_by_tabs_are_text_as_it_stands(tmp_path, end):
    text = end.join(["a\t b", f'"x\ty"{SEPARATORS}', "\t ", "'\t\\t"]) + end
    assert read(tmp_path, "a.tsv", text, read_tsv) == [
        ("2", {"a": '"x', " b": f'y"{SEPARATORS}'}),
        ("3", {"a": "", " b": " "}),
        ("4", {"a": "'", " b": "\\t"}),
    ]
    assert [record.fields for record in read_tsv(write(tmp_path, "a.tsv", f"1\t2{end}"), ("x", "y"))] == [
        {"x": "1", "y": "2"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: got '', expected a different name for each column"),
        ("a\tb\ta\n1\t2\t3\n", r"line 1: got 'a\\tb\\ta', expected a different name"),
        ("a\tb\n1\t2\n3\n", r"line 3: 1 fields, expected 2 separated by tabs \(a, b\)"),
        ("a\tb\n1\t2\t3\n", "line 2: 3 fields, expected 2"),
        ("a\tb\n1\t2\n\n", "line 3: 1 fields"),
    ],
)
def test_a_malformed_table_names_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"a\.tsv, {message}"):
        read(tmp_path, "a.tsv", text, read_tsv)


def test_a_list_or_table_without_rows_has_none(tmp_path):
    assert read(tmp_path, "a.json", " [\n ] \n") == []
    assert read(tmp_path, "a.tsv", "a\tb\n", read_tsv) == []


def test_what_is_no_text_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"no file .* Pass the path of a published file"):
            read_text(path)
    for name, data in [("a.json", b'["\xff"]'), ("a.json", "[]".encode("utf-16")), ("a.json.gz", b"[]")]:
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as UTF-8 text"):
            read(tmp_path, name, data)
    for name in ("a.csv", "a.json.zip", "json", "a.gz"):
        with pytest.raises(ValueError, match=rf"{name}: expected a file that ends in \.json or \.jsonl"):
            read_json(tmp_path / name)


def test_texts():
    record = Record({"a": " x ", "b": "", "c": 3, "d": "\ud83d half", "e": "😀"}, "f, line 7")
    assert (record.text("a"), record.text("e"), record.text("b", may_be_empty=True)) == (" x ", "😀", "")
    for field, message in [
        ("b", r"got '', expected a text that is not empty\. Correct or remove the row; its fields are a, b, c, d, e\."),
        ("c", "got 3, expected a text"),
        ("d", "got '.ud83d half', expected a text of whole characters"),
        ("x", "got nothing, expected this field"),
    ]:
        with pytest.raises(ValueError, match=f"^f, line 7, field '{field}': {message}"):
            record.text(field)


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3\n", "0.3e1"])
def test_numbers(value):
    assert Record({"a": value}, "row 1").number("a") == 3


@pytest.mark.parametrize("value", [True, False, None, "", "three", "3,0", [3], {}, 10**400])
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"^row 1, field 'a': got .*, expected a number\."):
        Record({"a": value}, "row 1").number("a")


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", '"nan"', '"inf"', "1e400", '"1e400"'])
def test_what_json_writes_beyond_numbers_is_refused_where_a_number_is_wanted(tmp_path, written):
    (record,) = read_json(write(tmp_path, "a.jsonl", f'{{"a": {written}}}'))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, field 'a': got .*, expected a finite number"):
        record.number("a")


def test_one_and_true_and_their_texts_are_different_choices():
    values = (1, "1", True, 1.0)
    for number, value in enumerate(values):
        assert Record({"a": value}, "row 1").choice("a", {value: "found"}) == "found"
        for other in values[:number] + values[number + 1 :]:
            with pytest.raises(ValueError, match=rf"^row 1, field 'a': got {other!r}, expected one of {value!r}\."):
                Record({"a": other}, "row 1").choice("a", {value: "found"})
    for value in (None, [1], float("nan")):
        with pytest.raises(ValueError, match="expected one of 1, '1'"):
            Record({"a": value}, "row 1").choice("a", {1: "number", "1": "text"})


def test_parts_of_a_row_know_where_they_stand():
    record = Record({"a": {"b": {"c": 1}}, "list": [{"d": "x"}, {"d": " "}, 3], "none": []}, "f, line 2")
    with pytest.raises(ValueError, match=r"^f, line 2, in 'a', in 'b', field 'c': got 1, expected a text"):
        record.record("a").record("b").text("c")
    with pytest.raises(ValueError, match=r"^f, line 2, field 'list\[2\]': got 3, expected an object with fields"):
        record.records("list")
    first, second = Record({"list": record.items("list")[:2]}, "f, line 2").records("list")
    assert first.text("d") == "x"
    with pytest.raises(ValueError, match=r"^f, line 2, in 'list\[1\]', field 'd': got ' '"):
        second.text("d")
    for field in ("none", "a"):
        with pytest.raises(ValueError, match=rf"field '{field}': got .*, expected a list that is not empty"):
            record.items(field)
    assert record.has("a", "none")
    assert not record.has("a", "b")


def test_a_long_value_is_shortened_in_an_error():
    with pytest.raises(ValueError, match=r"got 'x{76}[.]{3}, expected a number"):
        Record({"a": "x" * 10_000}, "row 1").number("a")
