"""Every layout on a tree of a few crops, and every mistake with its message or its warning."""

import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from affscl.data.datasets import (
    MARKET_NAME,
    DataOptions,
    Dataset,
    Sample,
    can_evaluate,
    compile_pattern,
    data_problems,
    folder_samples,
    image_files,
    known,
    listing,
    load_dataset,
    msmt_sample,
    numbers,
    parse_name,
    parse_names,
    summary_row,
)
from affscl.use.search import folder_crops

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c3s1_000551_00.jpg", "0007_c6s4_000001_01.png"],
    "query": ["0001_c2s1_000301_00.jpg", "0003_c1s1_000002_00.jpg"],
    "bounding_box_test": [
        "-1_c1s1_000401_03.jpg",
        "0000_c2s1_000011_01.jpg",
        "0001_c4s1_000001_00.jpg",
        "0003_c3s1_000001_00.jpg",
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0005_c5_f0051341.jpg", "7139_c8_f0000001.jpg"],
}


def tree(root, files):
    """Write a small image under every name of {folder: [names]}."""
    for folder, names in files.items():
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 8)).save(path)
    return root


def ids(samples):
    return [(Path(s.path).name, s.pid, s.camid) for s in samples]


class TestMarketLayout:
    def test_market(self, tmp_path):
        root = tree(tmp_path / "Market-1501-v15.09.15", MARKET)
        data = load_dataset("market1501", root)
        assert ids(data.train) == [
            ("0002_c1s1_000451_03.jpg", 2, 1),
            ("0002_c3s1_000551_00.jpg", 2, 3),
            ("0007_c6s4_000001_01.png", 7, 6),
        ]
        assert ids(data.query) == [("0001_c2s1_000301_00.jpg", 1, 2), ("0003_c1s1_000002_00.jpg", 3, 1)]
        # junk (-1) goes, the distractor (0) stays
        assert ids(data.gallery) == [
            ("0000_c2s1_000011_01.jpg", 0, 2),
            ("0001_c4s1_000001_00.jpg", 1, 4),
            ("0003_c3s1_000001_00.jpg", 3, 3),
        ]
        assert data.name == "market1501" and data.root == root
        assert all(s.domain == 0 and Path(s.path).is_file() for s in data.train + data.query + data.gallery)

    def test_parent_own_folder_and_environment_give_the_same(self, tmp_path, monkeypatch):
        root = tree(tmp_path / "Market-1501-v15.09.15", MARKET)
        own = load_dataset("market1501", str(root))
        parent = load_dataset("market1501", tmp_path)
        monkeypatch.setenv("AFFSCL_DATA", str(tmp_path))
        environment = load_dataset("market1501")
        for other in (parent, environment):
            assert (other.root, other.train, other.query, other.gallery) == (
                own.root,
                own.train,
                own.query,
                own.gallery,
            )

    def test_argument_wins_over_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AFFSCL_DATA", str(tmp_path / "nowhere"))
        assert len(load_dataset("market1501", tree(tmp_path / "a", MARKET)).train) == 3

    def test_a_relative_root_survives_a_change_of_folder(self, tmp_path, monkeypatch):
        tree(tmp_path / "a", MARKET)
        monkeypatch.chdir(tmp_path)
        data = load_dataset("market1501", "a")
        monkeypatch.chdir("/")
        assert Path(data.train[0].path).is_file()

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        tree(tmp_path / "crops", MARKET)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(load_dataset("market1501", "~/crops").query) == 2

    def test_duke_keeps_distractors_with_ordinary_pids(self, tmp_path):
        data = load_dataset("dukemtmc", tree(tmp_path / "DukeMTMC-reID", DUKE).parent)
        assert ids(data.gallery) == [("0005_c5_f0051341.jpg", 5, 5), ("7139_c8_f0000001.jpg", 7139, 8)]

    @pytest.mark.parametrize(
        "given_root, lies_in",
        [
            ("cuhk03-np", "cuhk03-np/labeled"),
            ("", "cuhk03-np/labeled"),
            ("cuhk03-np/labeled", "cuhk03-np/labeled"),
            ("", "cuhk03-np/detected"),
            ("cuhk03-np", "cuhk03-np/detected"),
            ("cuhk03-np/detected", "cuhk03-np/detected"),
        ],
    )
    def test_cuhk03_from_every_root(self, tmp_path, given_root, lies_in):
        files = {
            "bounding_box_train": ["0001_c1_1.png"],
            "query": ["0003_c1_1.png"],
            "bounding_box_test": ["0003_c2_6.png"],
        }
        tree(tmp_path / lies_in, files)
        data = load_dataset("cuhk03", tmp_path / given_root)
        assert data.root == tmp_path / lies_in and ids(data.gallery) == [("0003_c2_6.png", 3, 2)]

    @pytest.mark.parametrize(
        "given_root, lies_in",
        [("", "cuhk03np"), ("cuhk03np", "cuhk03np"), ("", "cuhk03-np/detected"), ("cuhk03-np", "cuhk03-np/labeled")],
    )
    def test_cuhk03np_from_every_root(self, tmp_path, given_root, lies_in):
        tree(tmp_path / lies_in, MARKET)
        data = load_dataset("cuhk03np", tmp_path / given_root)
        assert data.name == "cuhk03np" and data.root == tmp_path / lies_in and data.train

    def test_cuhk03_takes_the_detectors_boxes_if_both_are_there(self, tmp_path):
        for kind in ("labeled", "detected"):
            tree(tmp_path / "cuhk03-np" / kind, MARKET)
        assert load_dataset("cuhk03", tmp_path).root.name == "detected"
        assert load_dataset("cuhk03", tmp_path / "cuhk03-np" / "labeled").root.name == "labeled"

    def test_hidden_files_and_others_are_ignored(self, tmp_path):
        root = tree(tmp_path, MARKET)
        for name in ["._0002_c1s1_000451_03.jpg", ".DS_Store", "Thumbs.db", "readme.txt"]:
            (root / "query" / name).touch()
        (root / "query" / ".cache").mkdir()
        (root / "query" / ".cache" / "holiday.jpg").touch()
        assert len(load_dataset("market1501", root).query) == 2

    def test_a_name_that_does_not_parse_is_named(self, tmp_path):
        root = tree(tmp_path, {**MARKET, "query": ["holiday.jpg"]})
        with pytest.raises(ValueError, match=re.escape(str(root / "query" / "holiday.jpg"))):
            load_dataset("market1501", root)

    @pytest.mark.parametrize(
        "split, folder", [("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")]
    )
    def test_an_empty_split_is_named(self, tmp_path, split, folder):
        root = tree(tmp_path, {k: v for k, v in MARKET.items() if k != folder})
        (root / folder).mkdir()
        with pytest.raises(ValueError, match=f"the {split} split is empty"):
            load_dataset("market1501", root)

    def test_a_gallery_of_junk_alone_is_empty(self, tmp_path):
        root = tree(tmp_path, {**MARKET, "bounding_box_test": ["-1_c1s1_000401_03.jpg"]})
        with pytest.raises(ValueError, match="the gallery split is empty"):
            load_dataset("market1501", root)


class TestWrongRoot:
    def test_shows_the_expected_tree_and_what_is_there(self, tmp_path):
        for name in ["train", "photos"]:
            (tmp_path / name).mkdir()
        (tmp_path / "notes.txt").touch()
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("market1501", tmp_path)
        message = str(error.value)
        for expected in [
            "market1501",
            str(tmp_path),
            "Market-1501-v15.09.15",
            "bounding_box_train/",
            "query/",
            "bounding_box_test/",
            "notes.txt, photos/, train/",
        ]:
            assert expected in message

    def test_one_folder_missing(self, tmp_path):
        root = tree(tmp_path / "Market-1501-v15.09.15", {k: v for k, v in MARKET.items() if k != "query"})
        with pytest.raises(
            FileNotFoundError, match=re.escape(f"{root} holds bounding_box_test/, bounding_box_train/.")
        ):
            load_dataset("market1501", tmp_path)

    def test_no_such_folder_shows_the_nearest_one(self, tmp_path):
        (tmp_path / "datasets").mkdir()
        with pytest.raises(FileNotFoundError, match=f"not a folder. {tmp_path} holds datasets/"):
            load_dataset("msmt17", tmp_path / "dataset" / "MSMT17")

    def test_long_listings_are_cut(self, tmp_path):
        for i in range(40):
            (tmp_path / f"{i:02}.txt").touch()
        assert listing(tmp_path, 3) == f"{tmp_path} holds 00.txt, 01.txt, 02.txt and 37 more."
        assert listing(tmp_path, 40).count(".txt") == 40 and "more" not in listing(tmp_path, 40)

    def test_without_root_says_what_to_set(self, monkeypatch):
        with pytest.raises(ValueError, match="AFFSCL_DATA"):
            load_dataset("market1501")
        monkeypatch.setenv("AFFSCL_DATA", "")
        with pytest.raises(ValueError, match="AFFSCL_DATA"):
            load_dataset("market1501")

    @pytest.mark.parametrize(
        "typed, meant",
        [
            ("market", "market1501"),
            ("Market-1501", "market1501"),
            ("duke", "dukemtmc"),
            ("MSMT17_V1", "msmt17"),
            ("cuhk", "cuhk03"),
        ],
    )
    def test_unknown_name(self, typed, meant):
        with pytest.raises(ValueError) as error:
            load_dataset(typed, "anywhere")
        assert f"Did you mean {meant!r}" in str(error.value)
        assert "market1501, dukemtmc, msmt17, cuhk03, cuhk03np, folder" in str(error.value)

    def test_name_without_resemblance(self):
        with pytest.raises(ValueError, match="unknown dataset 'zzz'. The datasets are"):
            load_dataset("zzz", "anywhere")

    def test_a_pattern_is_for_folders_only(self, tmp_path):
        with pytest.raises(ValueError, match="pattern"):
            load_dataset("market1501", tree(tmp_path, MARKET), pattern="(?P<pid>.)")


class TestMsmt:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "MSMT17_V1"
        lists = {
            "train": ["0000/0000_000_01_0303morning_0008_1.jpg 0", "0001/0001_003_15_0113noon_0011_0.jpg 1"],
            "val": ["0000/0000_020_04_0303morning_0009_2.jpg 0", ""],
            "query": ["0000/0000_000_14_0303morning_0008_1.jpg 0"],
            "gallery": ["0000/0000_001_02_0303morning_0008_1.jpg 0", "0009/0009_001_02_0303morning_0008_1.jpg 9"],
        }
        for name, lines in lists.items():
            images = root / ("train" if name in ("train", "val") else "test")
            images.mkdir(parents=True, exist_ok=True)
            (root / f"list_{name}.txt").write_text("\n".join(lines))
        return root

    def test_lists(self, root):
        data = load_dataset("msmt17", root.parent)
        assert [(s.pid, s.camid) for s in data.train] == [(0, 1), (0, 4), (1, 15)]  # train and val together, sorted
        assert [(s.pid, s.camid) for s in data.query] == [(0, 14)]
        assert [(s.pid, s.camid) for s in data.gallery] == [(0, 2), (9, 2)]
        assert data.train[0].path == str(root / "train" / "0000" / "0000_000_01_0303morning_0008_1.jpg")
        assert data.gallery[1].path == str(root / "test" / "0009" / "0009_001_02_0303morning_0008_1.jpg")

    @pytest.mark.parametrize(
        "line", ["0000/0000_000_0", "0000/0000_000.jpg 0", "0000/0000_000_x_1.jpg 0", "0000/0000_000_01_1.jpg a b"]
    )
    def test_a_broken_line_is_named(self, root, line):
        (root / "list_query.txt").write_text("0000/0000_000_14_0303morning_0008_1.jpg 0\n" + line)
        with pytest.raises(ValueError, match=re.escape(f"line 2 of {root / 'list_query.txt'}: {line!r}")):
            load_dataset("msmt17", root)

    def test_a_missing_list_shows_the_tree(self, root):
        (root / "list_val.txt").unlink()
        with pytest.raises(FileNotFoundError, match="list_val.txt"):
            load_dataset("msmt17", root)

    def test_an_empty_list(self, root):
        (root / "list_gallery.txt").write_text("\n")
        with pytest.raises(ValueError, match="the gallery split is empty"):
            load_dataset("msmt17", root)

    def test_the_camera_is_in_the_file_name_not_in_the_folder(self):
        assert msmt_sample(Path("x"), "a_b_9_c/0000_000_01_x.jpg 3") == Sample(
            str(Path("x", "a_b_9_c/0000_000_01_x.jpg")), 3, 1
        )


class TestFolder:
    def test_market_like_names_are_found_and_others_are_unknown(self, tmp_path):
        root = tree(tmp_path, {"monday": ["0012_c3s1_000001_00.jpg", "img_07.jpg"], "tuesday/late": ["0013_c12_4.png"]})
        data = load_dataset("folder", root)
        assert ids(data.train) == [
            ("0012_c3s1_000001_00.jpg", 12, 3),
            ("img_07.jpg", None, None),
            ("0013_c12_4.png", 13, 12),
        ]
        assert data.query == data.gallery == []

    def test_splits_and_names_counted_over_all_of_them(self, tmp_path):
        files = {
            "train": ["anna/x_1.png", "zoe/y_1.png"],
            "query": ["boris/x_1.png"],
            "gallery": ["boris/y_2.png", "carl/x_1.png"],
        }
        data = load_dataset("folder", tree(tmp_path, files), pattern=r"^(?P<pid>[^/]+)/(?P<camid>\w)_")
        assert [(s.pid, s.camid) for s in data.train] == [(1, 1), (4, 2)]
        assert [(s.pid, s.camid) for s in data.query] == [(2, 1)]
        assert [(s.pid, s.camid) for s in data.gallery] == [(2, 2), (3, 1)]

    def test_train_alone(self, tmp_path):
        assert len(load_dataset("folder", tree(tmp_path, {"train": ["a.png"], "other": ["b.png"]})).train) == 1

    @pytest.mark.parametrize("there", [["query"], ["train", "query"], ["query", "gallery"], ["train", "gallery"]])
    def test_some_splits_missing(self, tmp_path, there):
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("folder", tree(tmp_path, {split: ["a.png"] for split in there}))
        for split in {"train", "query", "gallery"} - set(there):
            assert split in str(error.value).split("but not")[1]

    def test_empty_query(self, tmp_path):
        root = tree(tmp_path, {"train": ["a.png"], "gallery": ["b.png"]})
        (root / "query").mkdir()
        with pytest.raises(ValueError, match="the query split is empty"):
            load_dataset("folder", root)

    def test_a_pattern_of_the_user_must_fit_every_crop(self, tmp_path):
        root = tree(tmp_path, {"": ["7_a.png", "holiday.png"]})
        with pytest.raises(ValueError, match="'holiday.png'"):
            load_dataset("folder", root, pattern=r"^(?P<pid>\d+)_")

    def test_a_pattern_may_leave_one_group_out_or_open(self, tmp_path):
        root = tree(tmp_path, {"": ["7_a.png", "8.png"]})
        assert [(s.pid, s.camid) for s in folder_samples(root, r"^(?P<pid>\d+)")["train"]] == [(7, None), (8, None)]
        assert [(s.pid, s.camid) for s in folder_samples(root, r"^(?P<pid>\d+)(_(?P<camid>\w))?")["train"]] == [
            (7, 1),
            (8, None),
        ]

    @pytest.mark.parametrize("pattern, said", [("(?P<pid>", "no regular expression"), (r"(\d+)_", r"\(\?P<pid>")])
    def test_broken_patterns(self, tmp_path, pattern, said):
        with pytest.raises(ValueError, match=said):
            load_dataset("folder", tree(tmp_path, {"": ["1_c1.png"]}), pattern=pattern)

    def test_junk_goes(self, tmp_path):
        assert ids(load_dataset("folder", tree(tmp_path, {"": ["-1_c1.png", "4_c1.png"]})).train) == [
            ("4_c1.png", 4, 1)
        ]

    @pytest.mark.parametrize("junk", ["-1", "-01"])
    def test_junk_goes_though_others_have_names(self, tmp_path, junk):
        root = tree(tmp_path, {"": [f"{junk}_c1.png", "anna_c1.png", "4_c1.png"]})
        data = load_dataset("folder", root, pattern=r"(?P<pid>[^/_]+)_c(?P<camid>\d+)")
        assert ids(data.train) == [("4_c1.png", 1, 1), ("anna_c1.png", 2, 1)]

    def test_junk_goes_from_every_split_though_the_names_are_in_another(self, tmp_path):
        files = {"train": ["anna_c1.png"], "query": ["3_c1.png"], "gallery": ["-1_c1.png", "3_c2.png"]}
        data = load_dataset("folder", tree(tmp_path, files), pattern=r"(?P<pid>[^/_]+)_c(?P<camid>\d+)")
        assert len(data.gallery) == 1 and data.gallery[0].pid == data.query[0].pid != data.train[0].pid

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="the train split is empty"):
            load_dataset("folder", tmp_path)
        with pytest.raises(FileNotFoundError, match="not a folder"):
            load_dataset("folder", tmp_path / "none")


class TestNames:
    @given(
        pid=st.integers(-1, 99_999),
        camid=st.integers(0, 99),
        rest=st.sampled_from(["s1_000451_03.jpg", "_f0046182.jpg", "_1.png"]),
        folder=st.sampled_from(["", "a/", "0009_c9/", "x_c1s1/"]),
    )
    @settings(deadline=None, max_examples=60)
    def test_pid_and_camid_come_back_wherever_the_file_lies(self, pid, camid, rest, folder):
        assert tuple(map(int, parse_name(f"{folder}{pid:04d}_c{camid}{rest}"))) == (pid, camid)

    @pytest.mark.parametrize(
        "name", ["holiday.jpg", "0002-c1.jpg", "x0002_c1.jpg", "0002_c1/holiday.jpg", "0002_cam1.jpg"]
    )
    def test_other_names(self, name):
        assert parse_name(name) is None

    @given(st.sets(st.one_of(st.none(), st.integers(-1, 10**6).map(str), st.text("abxyz09_", min_size=1, max_size=4))))
    @settings(deadline=None, max_examples=100)
    def test_numbers(self, values):
        given_numbers = numbers(values)
        assert given_numbers[None] is None and given_numbers.keys() == values | {None}
        texts = values - {None}
        if all(re.fullmatch(r"-?\d+", t) for t in texts):
            assert all(given_numbers[t] == int(t) for t in texts)
        else:
            others = texts - {"-1"}
            assert sorted(given_numbers[t] for t in others) == list(
                range(1, len(others) + 1)
            )  # one each, never -1 or 0
            assert given_numbers.get("-1", -1) == -1  # junk in any company

    @given(st.sets(st.integers(2**53, 10**60) | st.integers(-1, 9), min_size=1), st.booleans())
    @settings(deadline=None, max_examples=60)
    def test_ids_of_any_length_fit_an_array(self, ids, with_text):
        found = numbers({str(i) for i in ids} | ({"anna"} if with_text else set()))
        assert len(set(found.values())) == len(found) and found.get("-1", -1) == -1
        np.array([v for v in found.values() if v is not None], dtype=np.int64)
        assert with_text or max(ids) > 2**52 or all(found[str(i)] == i for i in ids)

    def test_order_does_not_depend_on_the_file_system(self, tmp_path):
        names = ["b/2.jpg", "a/1.jpg", "B.jpg", "a.jpg", "c.JPEG"]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert image_files(tmp_path) == sorted(names)

    def test_links_are_followed_but_not_for_ever(self, tmp_path):
        outside = tree(tmp_path / "outside", {"more": ["1.png"]})
        inside = tree(tmp_path / "inside", {"": ["0.png"]})
        (inside / "link").symlink_to(outside)
        (outside / "back").symlink_to(inside)
        assert image_files(inside) == ["0.png", "link/more/1.png"]


class TestSummary:
    def test_table(self, tmp_path):
        assert repr(load_dataset("market1501", tree(tmp_path, MARKET))).splitlines() == [
            "market1501",
            "split    images  identities  cameras  distractors",
            "train         3           2        3",
            "query         2           2        2",
            "gallery       3           2        3            1",
        ]

    def test_unknown_pids_and_cameras_are_not_counted(self):
        samples = [Sample("a"), Sample("b", 0, 0), Sample("c", None, 0)]
        assert summary_row("train", samples) == ("train", "3", "1", "1", "")

    def test_distractors_are_those_nobody_asks_for(self):
        samples = [Sample("a", 4), Sample("b", 5), Sample("c", 5), Sample("d")]
        assert summary_row("gallery", samples, {4}) == ("gallery", "4", "1", "0", "2")

    def test_thousands(self):
        assert "12,936" in repr(Dataset("m", Path(), [Sample("a", 1, 1)] * 12_936, [], []))


class TestLongIds:
    LONG = "20240501123456789012345678901234567890"

    @pytest.mark.parametrize("camid", ["3", LONG])
    @pytest.mark.parametrize("pid", ["7", LONG])
    def test_market_names(self, tmp_path, pid, camid):
        files = {
            "bounding_box_train": ["0002_c1s1_000451_03.jpg"],
            "query": [f"{pid}_c{camid}s1_000301_00.jpg"],
            "bounding_box_test": [f"{pid}_c5s1_000301_00.jpg", f"{pid}_c{camid}s1_000302_00.jpg", "-1_c1s1_0_0.jpg"],
        }
        data = load_dataset("market1501", tree(tmp_path, files))
        query, (same, other) = data.query[0], sorted(data.gallery, key=lambda s: s.camid != data.query[0].camid)
        assert query.pid == same.pid == other.pid != data.train[0].pid
        assert query.camid == same.camid != other.camid
        for samples in (data.train, data.query, data.gallery):
            for field in ("pid", "camid"):
                assert known(samples, field).dtype == np.int64
        if (pid, camid) == ("7", "3"):
            assert (query.pid, query.camid) == (7, 3)

    def test_folder(self, tmp_path):
        root = tree(tmp_path, {"": [f"{self.LONG}_c1_0.png", f"{self.LONG}_c1_1.png", f"1{self.LONG}_c2_0.png"]})
        one, two = set(known(load_dataset("folder", root).train, "pid").tolist())
        assert one != two

    def test_joined_domains(self, tmp_path):
        from affscl.data.domains import join_domains

        names = [f"{2**52 - i}_c{2**52 - i}_0.png" for i in range(2)]
        source, target = (load_dataset("folder", tree(tmp_path / part, {"": names})) for part in "ab")
        joined = join_domains(source, target)
        for field in ("pid", "camid"):
            ids = known(joined.train, field)
            assert len(set(ids.tolist())) == 4 and np.array_equal(ids.astype(np.float64).astype(np.int64), ids)


def warned(*arguments, **named):
    """What `load_dataset` warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_dataset(*arguments, **named)
    return [str(warning.message) for warning in told]


class TestPeopleInBoth:
    def test_published_layouts_are_silent(self, tmp_path):
        assert warned("market1501", tree(tmp_path / "m", MARKET)) == []
        assert warned("dukemtmc", tree(tmp_path / "d", DUKE)) == []

    @pytest.mark.parametrize("split", ["query", "bounding_box_test"])
    def test_people_and_crops_are_counted(self, tmp_path, split):
        root = tree(tmp_path, {**MARKET, split: [*MARKET[split], "0002_c5s1_000001_00.jpg"]})
        (said,) = warned("market1501", root)
        assert said.startswith("market1501: people of query or gallery who are also in train: 1, with 2 of 3 training")
        assert str(root / "bounding_box_train" / "0002_c1s1_000451_03.jpg") in said

    def test_distractors_and_junk_are_nobody_unless_they_are_asked_for(self, tmp_path):
        files = {
            **MARKET,
            "bounding_box_train": [*MARKET["bounding_box_train"], "0000_c1s1_0_0.jpg", "-1_c1s1_0_0.jpg"],
        }
        assert warned("market1501", tree(tmp_path, files)) == []
        (said,) = warned("market1501", tree(tmp_path, {"query": ["0000_c3s1_000301_00.jpg"]}))
        assert "also in train: 1," in said and "1 of 4 training crops" in said

    def test_names_in_a_folder(self, tmp_path):
        files = {"train": ["anna_0.png", "boris_0.png"], "query": ["anna_1.png"], "gallery": ["anna_2.png"]}
        (said,) = warned("folder", tree(tmp_path, files), pattern=r"(?P<pid>[a-z]+)_")
        assert "also in train: 1," in said and "anna_0.png" in said

    def test_unknown_people_are_nobody(self, tmp_path):
        assert warned("folder", tree(tmp_path, {split: ["a.png"] for split in ("train", "query", "gallery")})) == []

    def test_msmt_numbers_train_and_test_independently(self, tmp_path):
        root = tmp_path / "MSMT17_V1"
        for part in ("train", "test"):
            (root / part).mkdir(parents=True)
        for name in ("train", "val", "query", "gallery"):
            (root / f"list_{name}.txt").write_text("0000/0000_000_14_0303morning_0008_1.jpg 0")
        assert warned("msmt17", root) == []


class TestSplitLikeFolders:
    @pytest.mark.parametrize(
        "name",
        ["Test", "test", "testing", "val", "Query", "probe", "GALLERY", "bounding_box_test", "my-test", "a/b/test"],
    )
    def test_what_was_found_and_how_it_is_used(self, tmp_path, name):
        (said,) = warned("folder", tree(tmp_path, {name: ["a.png", "b.png"], "photos": ["c.png"]}))
        assert f"named like splits: {name} (crops used as train: 2)." in said

    def test_all_of_them_are_named(self, tmp_path):
        root = tree(tmp_path, {"reid/train": ["a.png"], "reid/query": ["b.png"], "reid/gallery/x": ["c.png", "d.png"]})
        (said,) = warned("folder", root)
        used = [("gallery", 2), ("query", 1), ("train", 1)]
        assert ", ".join(f"reid/{name} (crops used as train: {n})" for name, n in used) in said

    def test_beside_train(self, tmp_path):
        (said,) = warned("folder", tree(tmp_path, {"train": ["a.png"], "test": ["b.png"], "other": ["c.png"]}))
        assert "named like splits: test (not used)." in said

    def test_inside_a_split(self, tmp_path):
        files = {"train/x": ["a.png"], "train/val": ["b.png"], "query": ["c.png"], "gallery": ["d.png"]}
        (said,) = warned("folder", tree(tmp_path, files))
        assert "named like splits: train/val (crops used as train: 1)." in said

    @pytest.mark.parametrize("name", ["anna", "latest", "contest", "trains", "valerie", "tester", "monday/late"])
    def test_other_names(self, tmp_path, name):
        assert warned("folder", tree(tmp_path, {name: ["a.png"]})) == []

    def test_splits_by_the_rule(self, tmp_path):
        files = {"train": ["0001_c1.png"], "query": ["0002_c1.png"], "gallery": ["0002_c2.png"]}
        assert warned("folder", tree(tmp_path / "test", files)) == []  # nor does the name of the root matter


class TestScoring:
    def test_known(self):
        samples = [Sample("a", 4, None), Sample("b", -1, 2)]
        assert known(samples, "pid").tolist() == [4, -1] and known(samples, "pid").dtype == np.int64
        assert known(samples, "camid") is None and known([], "pid") is None

    def test_can_evaluate(self, tmp_path):
        data = load_dataset("market1501", tree(tmp_path, MARKET))
        assert can_evaluate(data) is None
        assert can_evaluate(Dataset("d", tmp_path, data.train, [], data.gallery)) == "d has no query and gallery"
        strangers = Dataset("d", tmp_path, [], data.query, [*data.gallery, Sample("x")])
        assert can_evaluate(strangers) == "some crops in the query or gallery of d have no pid"


class TestOptions:
    @pytest.mark.parametrize("options", [{}, {"dataset": "synthetic"}, {"dataset": "folder", "pattern": "(?P<pid>.)"}])
    def test_fine(self, options):
        assert data_problems(DataOptions(**options)) == []

    def test_all_problems_at_once(self):
        assert len(data_problems(DataOptions(dataset="market", pattern="(?P<pid>.)"))) == 2

    def test_synthetic_people_are_drawn_not_loaded(self):
        with pytest.raises(ValueError, match="make_dataset"):
            load_dataset("synthetic", "anywhere")


class TestCameraNames:
    def test_a_camera_keeps_its_name_when_another_comes(self, tmp_path):
        pattern = r"_(?P<camid>[a-z0-9]+)_"
        few = load_dataset("folder", tree(tmp_path / "few", {"x": ["0_gate_.png", "1_lobby_.png"]}), pattern)
        more = load_dataset(
            "folder", tree(tmp_path / "more", {"x": ["0_gate_.png", "1_lobby_.png", "2_attic_.png"]}), pattern
        )
        assert [(s.camid, s.camera) for s in few.train] == [(1, "folder:gate"), (2, "folder:lobby")]
        assert [s.camera for s in more.train[:2]] == [s.camera for s in few.train] and more.train[0].camid == 2

    def test_numbers_have_one_name_in_any_company(self, tmp_path):
        pattern = r"_(?P<camid>\w+)\."
        for extra, names in (([], ["1", "2"]), (["2_attic.png"], ["1", "2", "attic"])):
            root = tree(tmp_path / str(len(extra)), {"x": ["0_01.png", "1_2.png", *extra]})
            assert [s.camera for s in load_dataset("folder", root, pattern).train] == [f"folder:{n}" for n in names]
        clash = load_dataset("folder", tree(tmp_path / "clash", {"x": ["0_01.png", "1_1.png", "2_attic.png"]}), pattern)
        assert [s.camera for s in clash.train] == ["folder:01", "folder:1", "folder:attic"]

    def test_every_layout_names_its_cameras_and_worlds_are_datasets_of_their_own(self, tmp_path):
        market = load_dataset("market1501", tree(tmp_path / "m", MARKET))
        assert {s.camera for s in market.train} == {"market1501:1", "market1501:3", "market1501:6"}
        assert load_dataset("dukemtmc", tree(tmp_path / "d", DUKE)).train[0].camera == "dukemtmc:2"
        worlds = []
        for seed in ("1", "2"):
            (tree(tmp_path / seed, MARKET) / "world.json").write_text(seed)
            worlds.append({s.camera for s in load_dataset("market1501", tmp_path / seed).train})
        assert not worlds[0] & worlds[1] and all(name.startswith("synthetic ") for name in worlds[0])

    def test_an_unknown_camera_has_no_name(self, tmp_path):
        data = load_dataset("folder", tree(tmp_path, {"x": ["0_a.png", "1.png"]}), r"^.*?(_(?P<camid>\w))?\.png")
        assert [(s.camid, s.camera) for s in data.train] == [(1, "folder:a"), (None, None)]


# Each of them needs longer for a name of sixty letters than there are years.
ENDLESS = {
    "repeat within repeat": r"(?P<pid>(a+)+)b",
    "three of them": r"(?P<pid>(.*)*(.*)*(.*)*z)",
    "words": r"(?P<pid>(\w+\s?)+)!$",
    "either way": r"(?P<pid>(a|aa)+)!",
    "huge repeats": r"(?P<pid>(?:(?:\w?){5000}){5000})!",
    "looking ahead": r"(?P<pid>(?:(?=(\w+))|\w)+)+!",
    "referring back": r"(?P<pid>(?:(\w*)\2?)*)!",
    "open ends": r"(?P<pid>\w*\w*\w*\w*\w*\w*\w*\w*\w*\w*\w*\w*)!",
    "case": r"(?i)(?P<camid>([A-Z]+)*)!",
}


class TestHostilePatterns:
    @pytest.mark.parametrize("how", ENDLESS)
    def test_an_endless_pattern_is_stopped_with_the_name_it_stood_at(self, how, tmp_path, monkeypatch):
        monkeypatch.setattr("affscl.data.datasets.PATIENCE", 1.0)
        root, start = tree(tmp_path, {"x": ["0.png", "a" * 60 + ".png"]}), time.monotonic()
        with pytest.raises(ValueError, match="takes more than 1.002 s; it stood at 'x/.*repeats within repeats"):
            load_dataset("folder", root, f"{ENDLESS[how]}|0")
        assert time.monotonic() - start < 20

    def test_in_a_thread_too_and_for_a_gallery(self, tmp_path, monkeypatch):
        monkeypatch.setattr("affscl.data.datasets.PATIENCE", 0.5)
        root = tree(tmp_path, {"x": ["a" * 60 + ".png"]})
        with ThreadPoolExecutor() as pool:
            tries = [pool.submit(read, ENDLESS["words"]) for read in (partial(load_dataset, "folder", root),)]
            tries += [pool.submit(folder_crops, root, ENDLESS["words"])]
            assert all("takes more than" in str(one.exception(timeout=60)) for one in tries)

    def test_names_of_any_letters_come_back_as_from_one_search(self):
        names = ["a_1.png", "\udcff_2.png", "\n_3.png", '"_4.png', "", "Ä_5.png", "x_٣.png", "\u2028_6.png"] * 50
        pattern = compile_pattern(r"(?s)(?P<pid>.)_(?P<camid>\d)")
        assert parse_names(names, pattern) == [parse_name(name, pattern) for name in names]

    def test_a_long_pattern_is_no_pattern(self, tmp_path):
        with pytest.raises(ValueError, match="no regular expression: 20,009 characters are too many"):
            load_dataset("folder", tree(tmp_path, {"x": ["a.png"]}), f"(?P<pid>{'a?' * 10_000})")

    @pytest.mark.parametrize("pattern", ["(?P<pid>a{99999999999999999999})", "(?:" * 9000 + "(?P<pid>a)" + ")" * 9000])
    def test_what_cannot_be_compiled_is_told(self, tmp_path, pattern):
        with pytest.raises(ValueError, match="is no regular expression"):
            load_dataset("folder", tree(tmp_path, {"x": ["a.png"]}), pattern)

    def test_a_huge_repeat_that_matches_nothing_is_a_name_that_does_not_match(self, tmp_path):
        with pytest.raises(ValueError, match="does not match 'a.png'"):
            load_dataset("folder", tree(tmp_path, {"x": ["a.png"]}).joinpath("x"), "(?P<pid>(b{60000}){60000})")


class TestHostileTrees:
    @pytest.mark.parametrize("root", ["/", "/proc", "/proc/self/root", "/proc/self/task", "/sys/kernel", "/../"])
    def test_the_whole_machine_is_no_folder_of_crops(self, root):
        with pytest.raises(FileNotFoundError, match="Expected a folder of crops"):
            load_dataset("folder", root)

    @pytest.mark.parametrize("to", ["/", "..", "../..", ".", "x", "/proc/self/root"])
    def test_a_link_to_what_holds_the_folder_is_not_followed(self, to, tmp_path):
        root = tree(tmp_path / "a" / "b", {"x": ["1.png"], "y": ["2.png"]})
        (tmp_path / "a" / "0.png").touch()
        (root / "y" / "link").symlink_to(to)
        assert image_files(root) == ["x/1.png", "y/2.png"]

    def test_a_long_search_is_said_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr("affscl.data.datasets.time.monotonic", iter(range(0, 10**6, 60)).__next__)
        with pytest.warns(UserWarning, match="still looking for images, now in") as told:
            image_files(tree(tmp_path, {"x": ["a.png"], "y": ["a.png"]}))
        assert len(told) == 1

    def test_ids_of_thousands_of_digits(self):
        long = "9" * 5000
        assert numbers({long, "8"}) == {"8": 1, long: 2, None: None}


PATTERNS = [MARKET_NAME, r"(?P<pid>\d+)", r"(?P<camid>\w*)", r"^(?P<pid>.*)_(?P<camid>.+)"]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=60), st.sampled_from(PATTERNS))
def test_the_parser_of_names_never_raises_and_answers_in_text(path, pattern):
    found = parse_name(path, pattern)
    assert found is None or all(part is None or part in path for part in found)
    named = {part for part in found or () if part is not None}
    counted = numbers(named)
    assert counted.keys() == named | {None} and all(abs(n) <= 2**52 for n in counted.values() if n is not None)
