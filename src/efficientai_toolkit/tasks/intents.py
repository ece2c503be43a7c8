"""Intents: CLINC150 (Larson et al. 2019), BANKING77 (Casanueva et al. 2020), or a file of `text,label`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError, DataNotFoundError, TaskSamplingError, did_you_mean
from ..files import read_json
from .base import TaskConfig, choice, where
from .labelled import read_examples
from .text import Corpus, Splits, TextFamily, split_classes

_CLINC = "https://github.com/clinc/oos-eval (data/data_full.json, data/domains.json)"
_BANKING = "https://github.com/PolyAI-LDN/task-specific-datasets (banking_data/)"
# Classes of train, val and test.
_SIZES = {"clinc150": (90, 30, 30), "banking77": (37, 20, 20)}


class IntentRows(NamedTuple):
    """Rows of an intent data set with their published part."""

    texts: list[str]
    labels: list[str]
    parts: list[str]  # train, val or test
    domains: dict[str, str]  # of each label


class Intents(TextFamily):
    """Intent classification with class-disjoint splits.

    The published train, val and test rows of a class are one pool: here whole classes are held out. CLINC150 gives
    90/30/30 classes, BANKING77 37/20/20, a file of one's own 60/20/20 %, each in an order fixed by the data set's name.

    Settings (`task_params`), besides those of `TextFamily`:
        dataset: "clinc150" (default), "banking77", the path of a file with columns text and label, or a list of
            these, whose classes are put together (then `within: true` keeps a task to one of them).
        split_by: "class", or "domain": whole domains of CLINC150 are held out (6/2/2 of its ten).
        without: domains of CLINC150 to leave out, such as [banking, credit_cards].
        split_seed: which random division of the classes into splits; 0. Others show how far a result depends on
            which classes are held out.
    """

    known_params = TextFamily.known_params | {"dataset", "split_by", "without", "split_seed"}

    def source(self, config: TaskConfig) -> tuple:
        given = config.task_params.get("dataset", "clinc150")
        sets = [given] if isinstance(given, str) else given
        if not isinstance(sets, Sequence) or not sets or not all(isinstance(name, str) for name in sets):
            raise TaskSamplingError(
                f"{where(config)}: dataset is {given!r}; expected a name, a path, or a list of them"
            )
        without = config.task_params.get("without", ())
        if isinstance(without, str) or not all(isinstance(name, str) for name in without):
            raise TaskSamplingError(f"{where(config)}: without is {without!r}; expected a list of domains")
        seed = config.task_params.get("split_seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise TaskSamplingError(f"{where(config)}: split_seed is {seed!r}; expected a whole number, at least 0")
        return tuple(sets), choice(config, "split_by", ("class", "domain")) == 1, tuple(without), seed

    def corpus(
        self,
        sets: Sequence[str] = ("clinc150",),
        by_domain: bool = False,
        without: Sequence[str] = (),
        split_seed: int = 0,
    ) -> Corpus:
        parts = [self._one(name, by_domain, without, split_seed, prefix=len(sets) > 1) for name in sets]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _one(self, name: str, by_domain: bool, without: Sequence[str], split_seed: int, *, prefix: bool) -> Corpus:
        rows = read_intents(name, self.root)
        without = without if name == "clinc150" else ()
        for domain in without:
            known = set(rows.domains.values())
            if domain not in known:
                raise TaskSamplingError(f"{name} has no domain {domain!r}{did_you_mean(domain, known)}")
        names = sorted(label for label in rows.domains if rows.domains[label] not in without)
        number = {label: i for i, label in enumerate(names)}
        groups = [rows.domains[label] for label in names]
        sizes = _SIZES.get(name, (0.6, 0.2, 0.2))
        if by_domain and len(set(groups)) < 6:
            raise DataError(f"{name} has no domains to split by; use split_by: class")
        order = f"{name} {split_seed}" if split_seed else name
        splits: Splits
        if by_domain or len(names) < len(rows.domains):
            # What is left out must not move the other classes between splits.
            full = sorted(rows.domains)
            whole = split_classes(
                len(full),
                order,
                (0.6, 0.2, 0.2) if by_domain else sizes,
                [rows.domains[n] for n in full] if by_domain else None,
            )
            splits = {s: [number[full[i]] for i in each if full[i] in number] for s, each in whole.items()}
        else:
            splits = split_classes(len(names), order, sizes)
        kept = [i for i, label in enumerate(rows.labels) if label in number]
        return Corpus(
            [rows.texts[i] for i in kept],
            np.array([number[rows.labels[i]] for i in kept]),
            [f"{Path(name).stem}/{label}" if prefix else label for label in names],
            splits,
            [Path(name).stem] * len(names) if prefix else groups,
        )


def read_intents(name: str, root: Path) -> IntentRows:
    """The data set `name` below `root`, or the file of that path."""
    if name == "clinc150":
        return _read_clinc(root / "clinc150")
    if name == "banking77":
        return _read_banking(root / "banking77")
    path = Path(name).expanduser()
    if not path.suffix:
        raise DataNotFoundError(
            f"unknown data set {name!r}; expected clinc150, banking77, or the path of a .csv or .jsonl file"
        )
    examples = read_examples(path)
    labels = [str(example.label) for example in examples]
    return IntentRows([e.text for e in examples], labels, ["train"] * len(labels), dict.fromkeys(labels, ""))


def out_of_scope(root: Path) -> dict[str, list[str]]:
    """CLINC150's queries that belong to none of its intents: train 100, val 100, test 1,000."""
    data = _json(root / "clinc150" / "data_full.json", _CLINC)
    return {part: [text for text, _ in data[f"oos_{part}"]] for part in ("train", "val", "test")}


def _read_clinc(folder: Path) -> IntentRows:
    data, domains = (_json(folder / name, _CLINC) for name in ("data_full.json", "domains.json"))
    try:
        rows = [(text, label, part) for part in ("train", "val", "test") for text, label in data[part]]
        domain_of = {label: domain for domain, labels in domains.items() for label in labels}
        texts, labels, parts = (list(column) for column in zip(*rows, strict=True))
        return IntentRows(texts, labels, parts, {label: domain_of[label] for label in dict.fromkeys(labels)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder} does not hold CLINC150's data_full.json and domains.json ({error!r})") from None


def _read_banking(folder: Path) -> IntentRows:
    texts, labels, parts = [], [], []
    for part in ("train", "test"):
        path = folder / f"{part}.csv"
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.reader(file)
                if next(reader, None) != ["text", "category"]:
                    raise DataError(f"{path}, line 1: expected BANKING77's header text,category")
                for row in reader:
                    if len(row) != 2 or not all(row):
                        raise DataError(f"{path}, line {reader.line_num}: expected text and category")
                    texts.append(row[0])
                    labels.append(row[1])
                    parts.append(part)
        except FileNotFoundError:
            raise DataNotFoundError(
                f"BANKING77 is not at {path}; get it from {_BANKING}, or name its parent with --data-dir"
            ) from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"cannot read {path}: {error}") from None
    return IntentRows(texts, labels, parts, dict.fromkeys(labels, ""))


def _json(path: Path, source: str):
    if not path.is_file():
        raise DataNotFoundError(f"CLINC150 is not at {path}; get it from {source}, or name its parent with --data-dir")
    return read_json(path)


def _joined(parts: Sequence[Corpus]) -> Corpus:
    before = np.cumsum([0, *(len(part.names) for part in parts)])
    splits = {
        split: np.concatenate([np.asarray(p.splits[split]) + n for p, n in zip(parts, before[:-1], strict=True)])
        for split in ("train", "val", "test")
    }
    labels = np.concatenate([part.labels + n for part, n in zip(parts, before[:-1], strict=True)])
    texts, names, groups = ([x for part in parts for x in getattr(part, f)] for f in ("texts", "names", "groups"))
    return Corpus(texts, labels, names, splits, groups)
