"""Files of tensors: written whole or not at all, with a digest that finds damage."""

import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from affscl.model import weights
from affscl.model.weights import read_tensors, write_safely, write_tensors

resource = pytest.importorskip("resource", reason="limits of a process are Unix's")


class TestTensorsWithADigest:
    def write(self, folder):
        path = folder / "a.safetensors"
        write_tensors(
            path,
            {
                "x": torch.randn(3, 4),
                "half": torch.ones(5, dtype=torch.bfloat16),
                "none": torch.empty(0, 2),
                "one": torch.tensor(3),
                "turned": torch.arange(6).reshape(2, 3).T,
            },
            {"epoch": 3, "who": [1, None, "é"]},
        )
        return path

    def test_comes_back(self, tmp_path):
        about, tensors = read_tensors(self.write(tmp_path))
        assert about == {"epoch": 3, "who": [1, None, "é"]}
        assert tensors["half"].dtype == torch.bfloat16 and tensors["none"].shape == (0, 2) and tensors["one"] == 3
        assert torch.equal(tensors["turned"], torch.arange(6).reshape(2, 3).T)

    def test_same_content_same_bytes(self, tmp_path):
        torch.manual_seed(1)
        first = self.write(tmp_path).read_bytes()
        torch.manual_seed(1)
        assert self.write(tmp_path).read_bytes() == first

    def test_no_damage_is_read_as_if_nothing_were(self, tmp_path):
        path = self.write(tmp_path)
        whole, rng = path.read_bytes(), np.random.default_rng(0)
        damaged = [whole[:n] for n in rng.integers(0, len(whole), 30)]
        damaged += [whole[:n] + bytes(len(whole) - n) for n in rng.integers(0, len(whole) - 50, 20)]
        damaged += [whole + b"\0", b"", b"{}", bytes(8), whole[8:], whole * 2, os.urandom(500)]
        for place in rng.integers(0, len(whole), 200):
            turned = bytearray(whole)
            turned[place] ^= 1 << rng.integers(8)
            damaged.append(bytes(turned))
        for data in damaged:
            path.write_bytes(data)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    read_tensors(path)
                    assert told and "no digest" in str(told[0].message)
                except ValueError as error:
                    assert str(path) in str(error)

    def test_another_programs_file_is_read(self, tmp_path):
        save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        about, tensors = read_tensors(tmp_path / "x.safetensors")
        assert about is None and torch.equal(tensors["x"], torch.ones(2))
        with pytest.raises(FileNotFoundError, match="y.safetensors"):
            read_tensors(tmp_path / "y.safetensors")

    def test_a_disk_without_space_leaves_the_old_file(self, tmp_path):
        path = self.write(tmp_path)
        whole = path.read_bytes()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(OSError, match="cannot write .*a.safetensors.*is whole"):
                write_tensors(path, {"x": torch.ones(10_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="cannot write"):
            write_safely(tmp_path / "file" / "x", lambda part: part.write_text("x"))

    def test_the_disk_has_the_bytes_before_the_name(self, tmp_path, monkeypatch):
        order = []
        monkeypatch.setattr(weights.os, "fsync", lambda _: order.append("sync"))
        move = os.replace
        monkeypatch.setattr(weights.os, "replace", lambda *a: (order.append("move"), move(*a)))
        write_safely(tmp_path / "x", lambda part: part.write_text("x"))
        assert order[:2] == ["sync", "move"]
