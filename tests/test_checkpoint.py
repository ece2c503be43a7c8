"""The checkpoint file: what is written is what is read, and no damage gets further than one sentence."""

from __future__ import annotations

import os
import pickle
import stat
import sys
import threading
import zipfile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientai_toolkit.checkpoint import FORMAT_VERSION, read_header, read_npz, write_npz
from efficientai_toolkit.errors import CheckpointError, CheckpointNotFoundError, OutputError

ARRAYS = {
    "model/layers.0.weight": mx.random.normal((3, 4), key=mx.random.key(0)),
    "model/half": mx.array([1.5, -2.0, float("inf")], dtype=mx.bfloat16),
    "model/narrow": mx.array([1.5, -2.0], dtype=mx.float16),
    "optimizer/step": mx.array(7, dtype=mx.uint64),
    "rng/counter": mx.array([1, 2], dtype=mx.uint32),
    "rule/empty": mx.zeros((0, 3)),
    "rule/mask": mx.array([True, False]),
}
HEADER = {"learner": {"algorithm": "maml"}, "config": {"name": "Ω"}}


def same(a, b) -> bool:
    a, b = ((x.view(mx.uint16) if x.dtype == mx.bfloat16 else x) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array(a).tobytes() == np.array(b).tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "made" / "here.npz"
    write_npz(path, ARRAYS, HEADER)
    return path


def test_round_trip_keeps_names_shapes_dtypes_and_bits(file):
    arrays, header = read_npz(file)
    assert list(arrays) == list(ARRAYS)
    assert all(same(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert arrays["model/half"].dtype == mx.bfloat16
    assert {name: header[name] for name in HEADER} == HEADER
    assert read_header(file)["format_version"] == FORMAT_VERSION


def test_numpy_reads_it_without_pickle(file):
    with np.load(file, allow_pickle=False) as members:
        assert np.array_equal(members["model/layers.0.weight"], np.array(ARRAYS["model/layers.0.weight"]))


def test_same_content_gives_the_same_bytes(file, tmp_path):
    write_npz(tmp_path / "again.npz", ARRAYS, HEADER)
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_transposed_arrays_are_written_in_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_npz(tmp_path / "a.npz", {"a": array, "b": mx.array(array).T})
    arrays, _ = read_npz(tmp_path / "a.npz")
    assert np.array_equal(np.array(arrays["a"]), array)
    assert np.array_equal(np.array(arrays["b"]), array.T)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file):
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="numbers only"):
        write_npz(file, {**ARRAYS, "bad": np.array(["text"])}, HEADER)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("able", [True, False], ids=["full", "plain"])
def test_a_mac_is_asked_to_write_to_the_disk_itself(file, monkeypatch, able):
    synced, full = [], 51  # F_FULLFSYNC there

    def fcntl(handle, command):
        if not able:
            raise OSError(45, "Operation not supported")
        synced.append(command)

    monkeypatch.setitem(sys.modules, "fcntl", SimpleNamespace(fcntl=fcntl, F_FULLFSYNC=full))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append("fsync"))
    write_npz(file, ARRAYS)
    assert synced == [full if able else "fsync"] * 2  # the file, and the folder that names it


def test_a_reader_beside_a_writer_sees_whole_files_only(tmp_path):
    path, stop, seen = tmp_path / "a.npz", threading.Event(), set()
    write_npz(path, {"a": np.full(5000, 0)})

    def write():
        for number in range(1, 30):
            write_npz(path, {"a": np.full(5000, number)})
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        values = np.unique(np.array(read_npz(path)[0]["a"]))
        assert len(values) == 1
        seen.add(int(values[0]))
    writer.join()
    assert seen


def test_it_has_the_usual_permissions(file):
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        write_npz(tmp_path / "file" / "a.npz", ARRAYS)


@pytest.mark.parametrize("header", [{"a": {1, 2}}, {"a": float("nan")}, {"format": "x"}])
def test_a_header_that_is_not_json_or_takes_our_names(tmp_path, header):
    with pytest.raises(CheckpointError):
        write_npz(tmp_path / "a.npz", ARRAYS, header)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_npz(tmp_path)


def foreign_files(tmp_path):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", header=np.array([{"a": 1}], dtype=object))
    np.savez_compressed(tmp_path / "bomb.npz", header=np.zeros(10**7, np.uint8))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "text.npz").write_text("not a checkpoint")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other_json.npz", header=np.frombuffer(b'{"format": "other"}', np.uint8))
    np.savez(tmp_path / "not_json.npz", header=np.frombuffer(b"\xff{", np.uint8))
    later = f'{{"format": "efficientai-toolkit", "format_version": {FORMAT_VERSION + 1}}}'.encode()
    np.savez(tmp_path / "later.npz", header=np.frombuffer(later, np.uint8))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("header.npy", b"no array")
    return {
        "foreign": "no header",
        "objects": "pickled objects",
        "bomb": "compressed",
        "pickle": "a pickle",
        "text": "not a checkpoint",
        "empty": "is empty",
        "other_json": "another format",
        "not_json": "damaged",
        "later": f"version {FORMAT_VERSION + 1}",
        "zip": "damaged",
    }


def test_foreign_files_are_named_for_what_they_are(tmp_path):
    for name, says in foreign_files(tmp_path).items():
        with pytest.raises(CheckpointError, match=says) as caught:
            read_npz(tmp_path / f"{name}.npz")
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_array_that_claims_more_than_the_file_holds_allocates_nothing(tmp_path):
    preamble = np.lib.format.magic(1, 0)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    header = b'{"format": "efficientai-toolkit", "format_version": %d, "bfloat16": []}' % FORMAT_VERSION
    np.savez(tmp_path / "a.npz", header=np.frombuffer(header, np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("a.npy", preamble + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(CheckpointError, match="as many numbers"):
        read_npz(tmp_path / "a.npz")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damage_is_noticed_or_harmless(tmp_path_factory, data):
    """Any bytes flipped, any cut: the same content comes back, or a `CheckpointError`; never anything else."""
    folder = tmp_path_factory.getbasetemp() / "damage"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.npz"
    if not whole.exists():
        write_npz(whole, ARRAYS, HEADER)
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="flips")):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = folder / "damaged.npz"
    damaged.write_bytes(content)
    try:
        arrays, header = read_npz(damaged)
    except CheckpointError as error:
        said = str(error)
        assert "\n" not in said
    else:
        assert list(arrays) == list(ARRAYS)
        assert all(same(arrays[name], ARRAYS[name]) for name in ARRAYS)
        assert {name: header[name] for name in HEADER} == HEADER
