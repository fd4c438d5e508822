import gzip
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from jmeta.data.sources import DataUnavailable, from_arrays, from_datasets, from_tfds

ROWS = [
    {"text": "a\u2028b", "label": 0, "split": "train", "v": [1.0, 2.0]},
    {"text": 'ü, "q"', "label": 1, "split": "train", "v": [3.0, 4.0]},
    {"text": "c", "label": 2, "split": "test", "v": [5.0, 6.0]},
]


def write(path, rows, kind):
    table = pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())})
    if kind == ".parquet":
        pa.parquet.write_table(table, path)
    elif kind == ".csv":
        pa.csv.write_csv(table.drop_columns(["v"]), path)
    elif kind == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if kind.endswith(".gz"):
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.write(text)
        else:
            path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".arrow", ".json", ".jsonl", ".jsonl.gz"])
def test_every_local_format_reads_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    write(path, ROWS, kind)
    columns = from_datasets(path)
    assert columns["text"] == [row["text"] for row in ROWS]
    assert columns["label"].dtype == np.int64
    np.testing.assert_array_equal(columns["label"], [0, 1, 2])
    if kind != ".csv":
        np.testing.assert_array_equal(columns["v"], [[1, 2], [3, 4], [5, 6]])
    assert from_datasets(path, split="test", columns=["text"]) == {"text": ["c"]}
    with pytest.raises(ValueError, match=r"no split 'valid', only \['test', 'train'\]"):
        from_datasets(path, split="valid")
    with pytest.raises(ValueError, match=r"no column 'txt'; its columns are \['label', 'split'"):
        from_datasets(path, columns=["txt"])


def test_folders_as_on_the_hub_and_as_saved(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    write(hub / "train-00000-of-00001.parquet", ROWS[:2], ".parquet")
    write(hub / "test-00000-of-00001.parquet", ROWS[2:], ".parquet")
    assert from_datasets(hub.parent, split="test")["text"] == ["c"]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]: say which"):
        from_datasets(hub.parent)

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    columns = from_datasets(tmp_path / "saved", split="train")
    np.testing.assert_array_equal(columns["label"], [1, 0])
    assert columns["label_name"] == ["yes", "no"]
    with pytest.raises(ValueError, match="no split 'dev'"):
        from_datasets(tmp_path / "saved", split="dev")
    gap = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, None]}, features=features)
    gap.save_to_disk(tmp_path / "gap")
    assert from_datasets(tmp_path / "gap")["label_name"] == ["yes", ""]


def test_a_relative_path_is_looked_for_in_jmeta_data(tmp_path, monkeypatch):
    write(tmp_path / "some.parquet", ROWS, ".parquet")
    monkeypatch.delenv("JMETA_DATA", raising=False)
    with pytest.raises(DataUnavailable, match="JMETA_DATA is not set"):
        from_datasets("some.parquet")
    monkeypatch.setenv("JMETA_DATA", str(tmp_path))
    assert len(from_datasets("some.parquet")["text"]) == 3


def test_a_hub_name_without_a_network_ends_at_once_in_one_clear_sentence():
    start = time.monotonic()
    with pytest.raises(DataUnavailable) as error:
        from_datasets("nobody/no-such-data-set", split="train")
    assert time.monotonic() - start < 20  # the first import of `datasets` included
    message = str(error.value)
    assert "'nobody/no-such-data-set' could not be had from the Hugging Face hub" in message
    assert "pass the path of a local copy" in message
    assert "JMETA_DATA" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".json"])
def test_an_empty_data_set_says_so(tmp_path, kind):
    write(tmp_path / f"e{kind}", [], kind)
    with pytest.raises(ValueError, match="holds no example"):
        from_datasets(tmp_path / f"e{kind}")


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
def test_a_file_from_windows_reads_the_same(tmp_path, kind):
    """A byte order mark, and lines that end in CR LF; a line separator inside a text is no end."""
    path = tmp_path / f"w{kind}"
    rows = [{"text": "é 東京", "label": "0"}, {"text": "a\u2028b", "label": "1"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == ".csv":
        lines = ["text,label", *(",".join(row.values()) for row in rows)]
    content = "\r\n".join(lines) + "\r\n"
    path.write_bytes(content.encode("utf-8-sig"))
    columns = from_datasets(path)
    assert columns["text"] == [row["text"] for row in rows]
    assert [str(each) for each in columns["label"]] == ["0", "1"]


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".json", ".jsonl.gz"])
def test_a_truncated_file_says_so(tmp_path, kind):
    path = tmp_path / f"t{kind}"
    write(path, ROWS * 40, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataUnavailable, match="damaged, cut short"):
        from_datasets(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[1, 2]", "row 0 is 1, no object with fields"),
        ('"a"', "row 0 is 'a', no object"),
        ('[{"a": 1}, null]', "row 1 is None, no object"),
        ('{"a": 123456789012345678901234567890}', "too large"),
    ],
)
def test_json_that_is_no_table_says_so(tmp_path, said, message):
    (tmp_path / "x.json").write_text(said)
    with pytest.raises(DataUnavailable, match=message):
        from_datasets(tmp_path / "x.json")


def test_a_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="no parquet, JSON"):
        from_datasets(tmp_path / "x.bin")


def test_a_file_without_split_column_is_its_own_train_split(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a"}], ".jsonl")
    assert from_datasets(tmp_path / "a.jsonl", split="train") == {"text": ["a"]}
    for split in ("test", "test[:1]"):
        with pytest.raises(ValueError, match="its own 'train' split; there is no 'test'"):
            from_datasets(tmp_path / "a.jsonl", split=split)


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("[:2]", [0, 1]),
        ("[2:]", [2, 3]),
        ("[-1:]", [3]),
        ("[25%:50%]", [1]),
        ("[:9]", [0, 1, 2, 3]),
    ],
)
def test_a_slice_of_a_split_is_the_same_wherever_it_comes_from(tmp_path, part, rows):
    import datasets

    texts = ["a", "b", "c", "d"]
    plain = [{"text": text} for text in texts]
    named = [{**row, "split": "train"} for row in plain]
    write(tmp_path / "plain.jsonl", plain, ".jsonl")
    other = {"text": "x", "split": "test"}
    write(tmp_path / "mixed.parquet", [named[0], other, *named[1:]], ".parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(plain)).save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.parquet", plain, ".parquet")
    for name in ("plain.jsonl", "mixed.parquet", "saved", "hub"):
        found = from_datasets(tmp_path / name, split=f"train{part}", columns=["text"])
        assert found == {"text": [texts[i] for i in rows]}, name


def test_what_is_no_slice_and_an_empty_one_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a"}], ".jsonl")
    with pytest.raises(ValueError, match=r"Unrecognized instruction format: train\[:2"):
        from_datasets(tmp_path / "a.jsonl", split="train[:2")
    with pytest.raises(ValueError, match="is a sum: read one slice at a time"):
        from_datasets(tmp_path / "a.jsonl", split="train[:1]+train[1:]")
    with pytest.raises(ValueError, match="holds no example"):
        from_datasets(tmp_path / "a.jsonl", split="train[1:]")


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_a_field_that_the_first_row_lacks_is_read_all_the_same(tmp_path, kind):
    rows = [{"text": "a"}, {"text": "b", "label": "x", "idx": 3}]
    path = tmp_path / f"a{kind}"
    write(path, rows, kind)
    columns = from_datasets(path)
    assert columns["label"] == [None, "x"]
    assert np.isnan(columns["idx"][0])
    assert columns["idx"][1] == 3


def test_arrays_must_be_equally_long():
    columns = from_arrays(x=np.eye(3, dtype=np.float32), text=["a", "b", "c"])
    assert columns["x"].dtype == np.float32
    assert columns["text"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="equally long"):
        from_arrays(x=[1, 2], y=[1])
    with pytest.raises(ValueError, match="at least one column"):
        from_arrays()


@pytest.fixture(scope="module")
def builder():
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"text": tfds.features.Text(), "label": np.int64}
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"text": f"text {i}", "label": i}

    return TinyTexts


def test_tfds_reads_array_record_and_names_the_remedy_otherwise(tmp_path, builder):
    made = builder(data_dir=tmp_path / "good", file_format="array_record")
    made.download_and_prepare()
    columns = from_tfds(str(made.data_dir), "train")
    assert sorted(columns["text"]) == [f"text {i}" for i in range(5)]
    assert [f"text {i}" for i in columns["label"]] == columns["text"]
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        from_tfds(str(made.data_dir), "test")
    other = builder(data_dir=tmp_path / "other", file_format="parquet")
    other.download_and_prepare()
    with pytest.raises(DataUnavailable, match=r"stored as parquet.*file_format='array_record'"):
        from_tfds(str(other.data_dir), "train")


def test_tfds_not_prepared_or_not_known(tmp_path):
    with pytest.raises(DataUnavailable, match=r"not prepared here.*download_and_prepare"):
        from_tfds("omniglot", "train", data_dir=tmp_path)
    with pytest.raises(DataUnavailable, match="tfds has no data set 'no_such_set'"):
        from_tfds("no_such_set", "train", data_dir=tmp_path)


def test_real_parquet_with_splits(jmeta_data):
    columns = from_datasets(jmeta_data / "intent" / "clinc150.parquet", split="val")
    assert len(columns["text"]) == 3100
    assert len(set(columns["intent"])) == 151
