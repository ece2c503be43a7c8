"""The text families: episodes whose tokens tell the class, splits without a class in common, files and their faults."""

from __future__ import annotations

import csv
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from efficientai_toolkit import TaskConfig, TaskDistribution
from efficientai_toolkit.errors import DataError, DataNotFoundError, TaskSamplingError
from efficientai_toolkit.tasks.glue import METRICS, matthews
from efficientai_toolkit.tasks.intents import Intents, out_of_scope, read_intents
from efficientai_toolkit.tasks.labelled import parse_examples, require_classes
from efficientai_toolkit.tasks.numbers import read_numbers
from efficientai_toolkit.tasks.text import split_classes, used_length
from text_models import THINGS, sentences, write_encoder, write_intents


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return write_encoder(folder / "encoder"), write_intents(folder / "mine.csv")


def tasks(source, count=6, way=2, split="train", **params):
    encoder, dataset = source
    settings = {"tokenizer": str(encoder), "dataset": str(dataset), "k_shot": 2, "query_per_class": 3, "split": split}
    configs = [TaskConfig(f"t{i}", "intents", way, task_params={**settings, **params}) for i in range(count)]
    return TaskDistribution(configs)


def words_of(source):
    from efficientai_toolkit.pretrained import load_tokenizer

    return load_tokenizer(source[0]).backend.id_to_token


def test_an_episode_has_one_topic_a_class_and_no_text_twice(source):
    word = words_of(source)
    topic = {thing: label for label, things in THINGS.items() for thing in things}
    [stack] = tasks(source).batch_at(0, 6)
    assert stack.support_x.dtype == mx.int32
    for sx, sy, qx, qy in zip(*(np.array(part) for part in stack), strict=True):
        texts = [tuple(row.tolist()) for row in np.concatenate([sx, qx])]
        assert len(set(texts)) == 10
        of_class = {}
        for row, label in zip(texts, np.concatenate([sy, qy]).tolist(), strict=True):
            [found] = {topic[word(token)] for token in row if word(token) in topic}
            of_class.setdefault(label, set()).add(found)
        assert all(len(found) == 1 for found in of_class.values())
        assert of_class[0] != of_class[1]


def test_the_splits_share_no_class_and_hold_all(source):
    word = words_of(source)
    things = {thing for each in THINGS.values() for thing in each}
    seen = {}
    for split in ("train", "val", "test"):
        stacks = tasks(source, 40, split=split).batch_at(0, 40)
        ids = np.unique(np.concatenate([np.array(s.query_x).ravel() for s in stacks]))
        seen[split] = {word(int(i)) for i in ids} & things
    assert sum(map(len, seen.values())) == len(things)
    assert not seen["train"] & seen["val"]
    assert not (seen["train"] | seen["val"]) & seen["test"]


def test_a_batch_is_padded_to_its_longest_text_only(source):
    [stack] = tasks(source, max_length=32).batch_at(0, 4)
    assert stack.support_x.shape[-1] == stack.query_x.shape[-1] == 8
    ids = np.zeros((2, 40), np.int32)
    ids[1, :9] = 5
    assert used_length(ids, 0) == 16
    ids[0, :39] = 5
    assert used_length(ids, 0) == 40


def test_distributions_can_be_seen_through_a_function_and_pickled(source):
    import pickle

    plain = tasks(source)
    seen = plain.through(lambda x: x.astype(mx.float32) / 2)
    [a], [b] = plain.batch_at(1, 2), seen.batch_at(1, 2)
    assert mx.array_equal(a.query_x / 2, b.query_x)
    assert mx.array_equal(seen.sample_episode("t0")[1] * 2, plain.sample_episode("t0")[1])
    assert plain.batch_at(1, 2)[0].query_x.dtype == mx.int32
    again = pickle.loads(pickle.dumps(plain))
    assert mx.array_equal(again.batch_at(1, 2)[0].query_x, a.query_x)


def test_within_keeps_an_episode_to_one_group(source, tmp_path):
    encoder, _ = source
    one = write_intents(tmp_path / "one.csv", [*list(THINGS)[:4], "music", "money"])
    two = write_intents(tmp_path / "two.csv", list(THINGS)[2:])
    family = Intents()
    config = TaskConfig(
        "t",
        "intents",
        2,
        task_params={
            "tokenizer": str(encoder),
            "dataset": [str(one), str(two)],
            "within": True,
            "k_shot": 1,
            "query_per_class": 1,
            "split": "test",
        },
    )
    drawn = family.tasks(config, {}, np.arange(200, dtype=np.uint64))["classes"]
    data = family.data_set(config)
    groups = data.groups[drawn]
    assert (groups[:, 0] == groups[:, 1]).all()
    assert set(groups[:, 0].tolist()) == {0, 1}
    assert {name.partition("/")[0] for name in data.names} == {"one", "two"}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dataset": "clinc"}, "unknown data set 'clinc'"),
        ({"dataset": 3}, "dataset is 3"),
        ({"max_length": 2}, "max_length is 2"),
        ({"within": 1}, "within is 1"),
        ({"tokenizer": 1}, "tokenizer is 1"),
        ({"split_by": "domains"}, "did you mean 'domain'"),
        ({"split_by": "domain"}, "has no domains to split by"),
        ({"split_seed": -1}, "split_seed is -1"),
        ({"split_seed": True}, "split_seed is True"),
        ({"k_shot": 20}, "has 20 texts, and an episode needs 23"),
    ],
)
def test_impossible_settings_are_said(source, params, said):
    with pytest.raises((TaskSamplingError, DataError), match=said):
        tasks(source, **params)


def test_split_classes_by_group_and_by_share():
    groups = [f"g{i // 3}" for i in range(30)]
    parts = split_classes(30, "x", groups=groups)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(30))
    assert [len({groups[i] for i in part}) for part in parts.values()] == [6, 2, 2]
    again = split_classes(30, "x", groups=groups)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)
    with pytest.raises(DataError, match="need 6"):
        split_classes(5, "x")


# --- files of texts and labels ------------------------------------------------------------------------------------


def test_csv_with_quotes_line_breaks_and_a_mark_at_its_start():
    data = '\ufefftext,label\n"a, b",one\n"c\nd",two\n\ne,one\n'.encode()
    rows = parse_examples(data, "x.csv", ".csv")
    assert [tuple(row) for row in rows] == [(2, "a, b", "one"), (3, "c\nd", "two"), (6, "e", "one")]


def test_json_lines_and_plain_lines():
    data = b'{"text": "a", "label": 1}\n{"text": "b", "label": "two"}\n'
    assert [row.label for row in parse_examples(data, "x.jsonl", ".jsonl")] == ["1", "two"]
    data = b'{"text": "a", "label": true}\n{"text": "b", "label": 2.5}\n'
    assert [row.label for row in parse_examples(data, "x.jsonl", ".jsonl")] == ["true", "2.5"]
    assert [row.text for row in parse_examples(b" a\nb, c \n\n \n", "-", "", labelled=False)] == [" a", "b, c "]


def test_a_blank_line_between_plain_lines_is_named():
    """Else the answers of `predict` would not stand at the lines of what was asked."""
    with pytest.raises(DataError, match=r"standard input: line 2: the text is empty; line 3: the text is empty$"):
        parse_examples(b"a\n\n \nb\n\n", "standard input", "", labelled=False)


@pytest.mark.parametrize("order", [("text", "label"), ("label", "text")])
def test_tabs_with_quotes_as_spreadsheets_write_them(order):
    """A quote that does not stand at both ends of a cell, or is not doubled, is a character like others."""
    cells = {
        '"I, the ""user"", want"': 'I, the "user", want',
        '5" pipe': '5" pipe',
        '"so': '"so',  # at the beginning of a cell, and below at the end of one
        'it is"': 'it is"',
        '"Yes" and "no"': '"Yes" and "no"',
        '"a\r\nb"': "a\r\nb",
        '""""': '"',
    }
    rows = [{"text": '"text"', "label": "label"}, *({"text": cell, "label": '"x"'} for cell in cells)]
    data = "".join("\t".join(row[name] for name in order) + "\r\n" for row in rows).encode()
    found = parse_examples(data, "x.tsv", ".tsv")
    assert [row.text for row in found] == list(cells.values())
    assert [row.line for row in found] == [2, 3, 4, 5, 6, 7, 9]
    assert {row.label for row in found} == {"x"}
    assert parse_examples(data.rstrip(), "x.tsv", ".tsv") == found


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"sep=,\r\ntext,label\r\na,x\r\n", ".csv"),
        (b'"SEP=,"\ntext,label\na,x\n', ".csv"),
        (b"sep=\t\ntext\tlabel\na\tx\n", ".tsv"),
        (b"text,label,,\na,x,,\n,,,\n", ".csv"),
        (b"text,label, \na,x\n", ".csv"),
        (b"text\tlabel\t\na\tx\t\n", ".tsv"),
    ],
)
def test_what_spreadsheets_leave_in_a_file(data, kind):
    (row,) = parse_examples(data, f"x{kind}", kind)
    assert (row.text, row.label) == ("a", "x")
    assert row.line == (3 if b"=" in data else 2)


def test_a_cell_may_be_long():
    limit, long = csv.field_size_limit(), "word " * 30_000
    rows = parse_examples(f"text,label\n{long},x\nb,y\n".encode(), "x.csv", ".csv")
    assert [row.text for row in rows] == [long, "b"]
    with pytest.raises(DataError, match="line 2: 3 columns"):
        parse_examples(f"text,label\n{long},x,y\n".encode(), "x.csv", ".csv")
    assert csv.field_size_limit() == limit


def test_a_label_may_be_of_any_characters_that_show():
    labels = ["día ñ", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\u00a0b", "日本"]
    data = "\n".join(["text,label", *(f"a,{label}\t" for label in labels)]).encode()
    assert [row.label for row in parse_examples(data, "x.csv", ".csv")] == labels


def test_a_line_ends_at_a_line_break_alone():
    data = "a\u2028b\x0bc\r\nd\x85e\x0cf\rg\x1ch\u2029i\n".encode()
    rows = parse_examples(data, "-", "", labelled=False)
    assert [(row.line, row.text) for row in rows] == [(1, "a\u2028b\x0bc"), (2, "d\x85e\x0cf"), (3, "g\x1ch\u2029i")]
    rows = parse_examples('{"text": "a\u2028b", "label": "x"}\r{"text": "c", "label": "y"}\r\n'.encode(), "-", ".jsonl")
    assert [(row.line, row.text) for row in rows] == [(1, "a\u2028b"), (2, "c")]
    (whole,) = parse_examples(rb'{"text": "\ud83d\ude00"}', "-", ".jsonl", labelled=False)
    assert whole.text == "\U0001f600"


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (b"text,label\na,x\n,y\nb,\n", ".csv", r"line 3: the text is empty; line 4: the label is missing"),
        (b"text,label\n" + b" ,x\n" * 8, ".csv", r"line 6: the text is empty \(and 3 more\)"),
        (b"txt,label\na,x\n", ".csv", r"line 1: unknown column 'txt'; did you mean 'text'\?"),
        (b"text\na\n", ".csv", r"line 1: 0 columns 'label'"),
        (b"text,label\na,x,y\n", ".csv", r"line 2: 3 columns where the header has 2"),
        (b'text,label\na,x\n"b,y\n', ".csv", r"line 3: not valid CSV"),
        (b"text,label\na,x\nb\xff,y\n", ".csv", r"line 3: not UTF-8 text \(byte 0xff\)"),
        (b"\n", ".csv", "is empty"),
        (b"text,label\n", ".csv", "a header and no rows"),
        (b'{"text": "a", "label": "x"}\n{"text"\n[1]\n', ".jsonl", r"line 2: not valid JSON .*line 3: list"),
        (b'{"text": "a", "lable": "x"}\n', ".jsonl", r"line 1: unknown key 'lable'; did you mean 'label'"),
        (b'{"text": 3, "label": "x"}\n', ".jsonl", r"line 1: text is 3, not a string"),
        (b'{"label": "x"}\n', ".jsonl", r"line 1: the text is empty"),
        (
            rb"""{"text": "a", "label": "x"}
{"text": "b \ud800", "label": "x"}
{"text": "c", "label": "y\udfff"}""",
            ".jsonl",
            r"line 2: \\ud800 is half of a surrogate pair.*; line 3: \\udfff is half of",
        ),
        (b'text,label\nb,"y\ty"\nc,"z\nz"\n', ".csv", r"line 2: the label 'y\\ty' holds '\\t'; .*line 3: .* '\\n'"),
        (b'{"text": "a", "label": "x\\u2028y\\u0085"}', ".jsonl", r"line 1: the label 'x\\u2028y' holds '\\u2028'"),
        (
            b'{"label": [1]}\n{"label": {}}\n{"label": NaN}\n{"label": 1e999}',
            ".jsonl",
            r"line 1: label is \[1\], not a string.*; line 2: label is \{\}.*; line 3: label is nan.*; line 4: .* inf",
        ),
        (b"text;label\na;x\n", ".csv", r"x.csv, line 1: the separator is ';' and must be ','$"),
        (b'"label";"text"\r\n"x";"a"\r\n', ".csv", r"line 1: the separator is ';' and must be ','$"),
        (b"Text\tLabel\na\tx\n", ".csv", r"line 1: the separator is '\\t' and must be ','$"),
        (b"text,label\na,x\n", ".tsv", r"line 1: the separator is ',' and must be '\\t'$"),
        (b"sep=;\r\ntext;label\r\na;x\r\n", ".csv", r"x.csv, line 1: the separator is ';' and must be ','$"),
        (b"sep=,\ntext;label\na;x\n", ".csv", r"line 2: the separator is ';' and must be ','$"),
        (b"text;label;;\na;x;;\n", ".csv", r"line 1: the separator is ';' and must be ','$"),
        (b"text,label,\na,x,b\n", ".csv", r"line 2: 3 columns where the header has 2"),
        (b"text,label\na,x,\n", ".csv", r"line 2: 3 columns where the header has 2"),
        (b'"text,label\na,x\n', ".csv", r"line 1: not valid CSV"),
        (b"a\tb", ".docx", r"are \.csv, \.tsv or \.jsonl"),
    ],
)
def test_bad_rows_are_named_by_line(data, kind, said):
    with pytest.raises(DataError, match=said):
        parse_examples(data, f"x{kind}", kind)


def test_one_label_alone_is_refused():
    with pytest.raises(DataError, match=r"lines 2 to 3: every example is 'x'"):
        require_classes(parse_examples(b"text,label\na,x\nb,x\n", "x.csv", ".csv"), "x.csv")


def test_numbers_from_csv_and_npz(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("a,label,b\n1,yes,2.5\n3,no,-1e3\n")
    x, labels = read_numbers(file)
    assert x.tolist() == [[1, 2.5], [3, -1000]]
    assert labels == ["yes", "no"]
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3, 4)), y=np.array([7, 8]))
    x, labels = read_numbers(tmp_path / "x.npz")
    assert x.shape == (2, 3, 4)
    assert labels == ["7", "8"]
    for text, said in (
        ("a,label\n1,x\nb,y\n", r"line 3: 'b' is not a number"),
        ("a,label\n1,x\n2,\n", r"line 3: the label is missing"),
        ('a,label\n1,x\n2,"y\nz"\n', r"example 2: the label 'y\\nz' holds '\\n'"),
        ("a,b\n1,2\n", "no column label"),
        ("a,label\nnan,x\n", "example 1 holds a number that is not finite"),
        ("a,label\n", "no rows"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=said):
            read_numbers(file)
    with pytest.raises(DataNotFoundError):
        read_numbers(tmp_path / "none.csv")


def test_a_folder_of_texts(source, tmp_path):
    encoder, _ = source
    for label in list(THINGS)[:6]:
        (tmp_path / label).mkdir()
        for i, text in enumerate(sentences(label)):
            (tmp_path / label / f"{i}.txt").write_text(text)
    from efficientai_toolkit.tasks.text_folder import TextFolder

    params = {"tokenizer": str(encoder), "k_shot": 1, "query_per_class": 2, "split": "val"}
    config = TaskConfig("t", "text_folder", 2, task_params=params)
    data = TaskDistribution([config], families={"text_folder": TextFolder(tmp_path)})
    assert data.batch_at(0, 1)[0].query_x.shape[:2] == (1, 4)
    for split, label in (("train", "garden"), ("val", "pets"), ("test", "garden")):
        (tmp_path / "text_folder" / split / label).mkdir(parents=True)
        (tmp_path / "text_folder" / split / label / "0.txt").write_text("a")
    with pytest.raises(DataError, match=r"text_folder: class 'garden' is in train/ and in test/, and few-shot"):
        TextFolder(tmp_path).corpus()
    (tmp_path / "text_folder" / "test" / "garden").rename(tmp_path / "text_folder" / "test" / "bike")
    assert TextFolder(tmp_path).corpus().names == ["train/garden", "val/pets", "test/bike"]
    shutil.rmtree(tmp_path / "text_folder")
    (tmp_path / "garden" / "0.txt").write_text(" ")
    with pytest.raises(DataError, match=r"garden.0\.txt is empty"):
        TextFolder(tmp_path).corpus()
    with pytest.raises(DataNotFoundError, match="no texts in"):
        TextFolder(tmp_path / "garden").corpus()


# --- the real data sets -------------------------------------------------------------------------------------------


def test_clinc150_and_banking77(data_dir):
    rows = read_intents("clinc150", data_dir)
    assert len(rows.texts) == 22_500
    assert len(rows.domains) == 150
    assert sorted(map(list(rows.domains.values()).count, set(rows.domains.values()))) == [15] * 10
    assert {part: len(texts) for part, texts in out_of_scope(data_dir).items()} == {
        "train": 100,
        "val": 100,
        "test": 1000,
    }
    corpus = Intents(data_dir).corpus(("clinc150",), True)
    domains = {split: {corpus.groups[i] for i in part} for split, part in corpus.splits.items()}
    assert [len(each) for each in domains.values()] == [6, 2, 2]
    assert not domains["train"] & domains["test"]
    rows = read_intents("banking77", data_dir)
    assert len(rows.texts) == 13_083
    assert [len(part) for part in Intents(data_dir).corpus(("banking77",)).splits.values()] == [37, 20, 20]


def test_another_split_seed_divides_the_classes_anew(source):
    def classes(**params):
        drawn = tasks(source, **params)
        splits = drawn.families["intents"].data_set(drawn.configs[0]).splits
        assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(8))
        return {split: sorted(part.tolist()) for split, part in splits.items()}

    assert classes(split_seed=0) == classes()
    divisions = [classes(split_seed=seed) for seed in range(6)]
    assert len({str(division) for division in divisions}) > 3  # two may be alike: the order is the path's, too
    assert {str([len(part) for part in division.values()]) for division in divisions} == {"[4, 2, 2]"}


def test_domains_left_out_move_no_other_class(data_dir):
    family = Intents(data_dir)
    whole, less = (family.corpus(("clinc150",), False, without) for without in ((), ("banking", "credit_cards")))
    for split in ("train", "val", "test"):
        gone = {whole.names[i] for i in whole.splits[split]} - {less.names[i] for i in less.splits[split]}
        assert {whole.groups[whole.names.index(name)] for name in gone} <= {"banking", "credit_cards"}
    assert len(less.names) == 120
    with pytest.raises(TaskSamplingError, match="did you mean 'banking'"):
        family.corpus(("clinc150",), False, ("bankin",))


def test_glue_and_superglue_in_their_own_formats(data_dir):
    from efficientai_toolkit.tasks.glue import TASKS, read_glue
    from efficientai_toolkit.tasks.superglue import TASKS as SUPER
    from efficientai_toolkit.tasks.superglue import read_superglue

    sizes = {"cola": (8551, 1043), "rte": (2490, 277), "wnli": (635, 71), "sst2": (67349, 872), "qnli": (0, 5463)}
    for name in TASKS:
        assert tuple(len(read_glue(data_dir, name, part)) for part in ("train", "dev")) == sizes[name]
    sizes = {
        "boolq": (0, 3270),
        "cb": (250, 56),
        "copa": (400, 100),
        "rte": (2490, 277),
        "wic": (5428, 638),
        "wsc": (554, 104),
    }
    for name in SUPER:
        assert tuple(len(read_superglue(data_dir, name, part)) for part in ("train", "dev")) == sizes[name]
        assert len(read_superglue(data_dir, name, "train", few=True)) == 32
    text, label = read_superglue(data_dir, "copa", "train", few=True)[0]
    assert text[0].endswith("floor. What was the cause?")
    assert label == "0"


@pytest.mark.parametrize(("name", "tasks"), [("glue", ["rte", "wnli"]), ("superglue", ["cb", "wsc"])])
def test_an_episode_of_a_benchmark_is_of_one_of_its_tasks(data_dir, source, name, tasks):
    from efficientai_toolkit.tasks import family

    kind = family(name)(data_dir)
    sizes = {"k_shot": 2, "query_per_class": 2}
    for split in ("train", "val", "test"):
        params = {"tokenizer": str(source[0]), "task": tasks, "split": split, **sizes}
        config = TaskConfig("t", name, 2, task_params=params)
        data = kind.data_set(config)
        drawn = kind.tasks(config, {}, np.arange(50, dtype=np.uint64))["classes"]
        of_task = [{data.names[c].rpartition("/")[0] for c in each} for each in drawn.tolist()]
        assert all(len(each) == 1 for each in of_task)
        assert set.union(*of_task) == {f"{split}/{task}" for task in tasks}
    with pytest.raises(TaskSamplingError, match="unknown task 'rt'; did you mean 'rte'"):
        kind.data_set(TaskConfig("t", name, 2, task_params={**params, "task": "rt"}))


def test_a_benchmark_task_that_is_damaged_or_not_there(tmp_path):
    from efficientai_toolkit.tasks.glue import read_glue

    with pytest.raises(DataNotFoundError, match="GLUE's RTE is not at"):
        read_glue(tmp_path, "rte", "train")
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    file = tmp_path / "glue" / "RTE" / "dev.tsv"
    file.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(DataError, match="line 2: label 'maybe'; expected one of entailment, not_entailment"):
        read_glue(tmp_path, "rte", "dev")
    file.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\n")
    with pytest.raises(DataError, match="line 2: 2 columns where the header has 4"):
        read_glue(tmp_path, "rte", "dev")


def test_metrics_of_small_cases():
    truth, guess = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    assert METRICS["accuracy"](guess, truth) == 0.75
    assert matthews(guess, truth) == pytest.approx(1 / 3**0.5)
    assert matthews(np.ones(4), truth) == 0
    assert METRICS["accuracy_and_f1"](guess, truth) == pytest.approx((0.75 + (2 / 3 + 0.8) / 2) / 2)


def test_a_saved_distribution_of_texts_comes_back(tmp_path, source):
    """A saved distribution of texts comes back with its data set's path."""
    distribution = tasks(source)
    distribution.save(tmp_path / "tasks.json")
    assert json.loads((tmp_path / "tasks.json").read_text())["configs"][0]["task_family"] == "intents"
    again = TaskDistribution.load(tmp_path / "tasks.json")
    assert mx.array_equal(again.batch_at(0, 2)[0].query_x, distribution.batch_at(0, 2)[0].query_x)


def test_hidden_files_and_folders_are_no_texts_and_no_classes(tmp_path):
    from efficientai_toolkit.tasks.folders import class_folders
    from efficientai_toolkit.tasks.text_folder import _classes

    for path in ("bike/0.txt", "bike/._0.txt", ".ipynb_checkpoints/0.txt", "garden/0.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("a")
    found = class_folders(tmp_path, _classes)[""]
    assert {name: [file.name for file in files] for name, files in found.items()} == {
        "bike": ["0.txt"],
        "garden": ["0.txt"],
    }
