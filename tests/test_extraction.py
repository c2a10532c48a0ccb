"""Extraction of all kinds of data: the same rows, cameras, domains, mirror images, and nothing left changed."""

import copy
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_networks import images, small, write_run

from affscl.data.augmentation import normalise
from affscl.data.datasets import Sample, load_dataset
from affscl.data.store import ImageStore
from affscl.model.extraction import extract, flushed_denormals, origins
from affscl.model.network import load_model
from affscl.model.norms import CameraNorm


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Ten little pictures on disk."""
    folder = tmp_path_factory.mktemp("crops")
    pixels = torch.randint(
        0, 256, (10, 64, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    samples = []
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
        samples.append(Sample(str(folder / f"{i}.png"), pid=i, camid=0))
    return samples


def test_extract_is_the_same_for_all_kinds_of_data_and_batch_sizes(crops, tmp_path):
    model = small()
    store = ImageStore(crops, 64, 32, cache=tmp_path, progress=False)
    pixels = store.batch(range(10))
    features = extract(model, store)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(normalise(pixels)).unit
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32 and features.device.type == "cpu" and not features.requires_grad
    for data in (crops, [s.path for s in crops], pixels, normalise(pixels)):
        for batch_size in (3, 10):
            torch.testing.assert_close(extract(model, data, batch_size=batch_size), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(10))


def test_rows_extract_some_images_only(crops, tmp_path):
    model = small()
    store = ImageStore([Sample(path) for path, *_ in crops], 64, 32, cache=tmp_path)
    assert torch.allclose(extract(model, store, rows=[2, 0]), extract(model, store)[[2, 0]], atol=1e-6)


def test_extract_leaves_the_model_as_it_was():
    model = small().train()
    model.backbone.layer1.eval()  # a part that someone froze
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    extract(model, images())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="expected float images"):
        extract(model, torch.zeros(2, 5, 64, 32))
    assert modes == [m.training for m in model.modules()]


def denormals_are_flushed():
    return (torch.tensor(1e-39) * 1).item() == 0


def test_denormals_are_flushed_inside_only():
    for before in (False, True):
        torch.set_flush_denormal(before)
        with flushed_denormals():
            assert denormals_are_flushed()
        assert denormals_are_flushed() == before
        with pytest.raises(KeyError), flushed_denormals():
            raise KeyError
        assert denormals_are_flushed() == before


def test_extract_flushes_denormals_and_puts_the_switch_back():
    seen, model = [], small()
    model.neck.register_forward_hook(lambda *_: seen.append(denormals_are_flushed()))
    extract(model, images())
    assert seen == [True] and not denormals_are_flushed()


def test_origins_are_asked_for_where_they_count():
    samples = [Sample("a.jpg", camid=3, domain=1), Sample("b.jpg")]
    domains, camids = origins(small(domains=2), samples)
    assert domains.tolist() == [1, 0] and camids.tolist() == [3, -1]
    assert origins(small(), samples)[0] is None


def test_extract_knows_domains_and_empty_data():
    model = small(domains=2)
    model(torch.cat([images(4), 5 * images(4) + 2]), [0] * 4 + [1] * 4)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images(), 1).unit
    torch.testing.assert_close(extract(model, images(), domain=1), expected)
    assert not torch.allclose(extract(model, images()), expected, atol=1e-2)
    assert extract(model, images(0)).shape == (0, 256)


def test_mirror_gives_a_crop_and_its_mirror_image_the_same_feature():
    model, pictures = small(mirror=True), images(5)
    assert torch.allclose(extract(model, pictures), extract(model, pictures.flip(3)), atol=1e-6)
    plain = small()
    plain.load_state_dict(model.state_dict())
    plain.eval()
    with torch.no_grad():
        assert torch.allclose(
            extract(model, pictures), F.normalize(plain(pictures).neck + plain(pictures.flip(3)).neck), atol=1e-6
        )


def test_a_network_with_camera_necks_uses_the_samples_cameras(crops, tmp_path):
    torch.manual_seed(0)
    model = small(camera_norm=True, camids=[1, 2], bn_chunk=2)
    assert isinstance(model.neck, CameraNorm), "chunks leave it alone"
    model.neck.camera_mean.normal_()
    samples = [Sample(path, camid=camid) for (path, *_), camid in zip(crops, (1, 2, None) * len(crops))]
    store = ImageStore(samples, 64, 32, cache=tmp_path)
    found = extract(model, store)
    camids = torch.tensor([-1 if sample.camid is None else sample.camid for sample in samples])
    assert torch.equal(found, extract(model, store.batch(range(len(store))), camids=camids))
    assert not torch.allclose(found, extract(model, store.batch(range(len(store)))))
    write_run(tmp_path / "run", model)
    assert torch.equal(extract(load_model(tmp_path / "run"), store), found)


def camera_tree(root, names):
    """A folder of crops with cameras of these names."""
    root.mkdir()
    for i, name in enumerate(names):
        colours = np.random.default_rng(i).integers(0, 256, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).save(root / f"{i:02d}_{name}_{i // 2}.png")
    return load_dataset("folder", root, r"_(?P<camid>\w+)_(?P<pid>\d+)")


def test_one_more_camera_moves_no_feature_and_is_said_once(tmp_path):
    data = camera_tree(tmp_path / "mine", ["gate", "lobby"] * 4)
    more = camera_tree(tmp_path / "more", ["gate", "lobby"] * 4 + ["attic"])
    assert [s.camid for s in data.train[:2]] == [1, 2] and [s.camid for s in more.train[:2]] == [2, 3]
    torch.manual_seed(0)
    trained = small(camera_norm=True, camids={s.camid: s.camera for s in data.train})
    trained.neck.camera_mean.normal_(), trained.neck.camera_var.uniform_(0.5, 2)
    write_run(tmp_path / "run", trained)
    model = load_model(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = extract(model, data.train)
    with pytest.warns(UserWarning, match=r"1 of 9 crops .* \(folder:attic\)") as told:
        found = extract(model, more.train)
        assert torch.equal(extract(model, more.train), found)
    assert len(told) == 1 and torch.equal(found[:8], wanted)
    plain = extract(model, more.train[8:], camids=torch.tensor([-1]))
    assert torch.allclose(found[8:], plain, atol=1e-6), "an unknown camera: what all cameras share"


def test_cameras_of_another_dataset_are_other_cameras(tmp_path):
    samples = [
        Sample(path, 1, i % 2 + 1, camera=f"market1501:{i % 2 + 1}") for i, path in enumerate(pictures_in(tmp_path))
    ]
    model = small(camera_norm=True, camids={1: "market1501:1", 2: "market1501:2"})
    model.neck.camera_mean.normal_()
    others = [s._replace(camera=s.camera.replace("market1501", "dukemtmc")) for s in samples]
    with pytest.warns(UserWarning, match="4 of 4 crops .*dukemtmc:1, dukemtmc:2"):
        assert not torch.allclose(extract(model, others), extract(model, samples), atol=1e-2)


def pictures_in(folder, n=4):
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return [str(folder / f"{i}.png") for i in range(n)]


# ---- crops of any kind


def test_crops_come_in_any_form(tmp_path, monkeypatch):
    model, paths = small(), pictures_in(tmp_path)
    wanted = extract(model, ImageStore([Sample(path) for path in paths], 64, 32, cache=tmp_path / "cache"))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    first = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    forms = [paths, [Path(p) for p in paths], (Path(p) for p in paths), np.array(paths), [Image.open(p) for p in paths]]
    forms += [
        arrays,
        np.stack(arrays),
        first,
        first.numpy(),
        list(first),
        [paths[0], arrays[1], Path(paths[2]), arrays[3]],
    ]
    for form in forms:
        torch.testing.assert_close(extract(model, form), wanted, rtol=1e-4, atol=1e-5)
    for one in (
        paths[0],
        Path(paths[0]),
        Sample(paths[0]),
        Image.open(paths[0]),
        arrays[0],
        first[0],
        first[0].numpy(),
    ):
        torch.testing.assert_close(extract(model, one), wanted[:1], rtol=1e-4, atol=1e-5)
    for none in ([], (), np.empty((0, 64, 32, 3), np.uint8), torch.empty(0, 3, 64, 32)):
        assert extract(model, none).shape == (0, 256)
    assert not (tmp_path / "mine").exists(), "a short list leaves no store behind"


def test_pictures_in_memory_are_brought_to_size_and_long_lists_to_a_store(tmp_path, monkeypatch):
    model, picture = small(), Image.open(pictures_in(tmp_path, 1)[0])
    large = picture.resize((320, 640))
    assert extract(model, [large, np.asarray(large)[..., :3], large.convert("L"), large.convert("RGBA")]).shape == (
        4,
        256,
    )
    monkeypatch.setattr("affscl.model.extraction.IN_MEMORY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert extract(model, [tmp_path / "0.png"]).shape == (1, 256)
    assert len(list((tmp_path / "mine" / "affscl").iterdir())) == 1


@pytest.mark.parametrize(
    "data, message",
    [
        ([None], "not <class 'NoneType'>"),
        (7, "not <class 'int'>"),
        ([["a.jpg"]], "not <class 'list'>"),
        ([np.zeros((8, 4, 3))], "crop 0: ValueError: an array of float64 of shape .8, 4, 3. is no picture"),
        (["gone.jpg", "gone too.jpg"], "2 of 2 images cannot be read.*gone.jpg.*gone too.jpg"),
        ("/dev/null", "this is no ordinary file"),
        ("/", "this is a folder"),
        ([torch.zeros(3, 8, 4), torch.zeros(3, 4, 4)], "must have one shape, not .3, 4, 4., .3, 8, 4."),
        ([torch.zeros(3, 8, 4), "a.jpg"], "not <class 'torch.Tensor'>"),
        (torch.zeros(5), "expected float images"),
    ],
)
def test_what_is_no_crop_is_named(data, message):
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        extract(small(), data)
