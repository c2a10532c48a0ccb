"""Extraction of all kinds of data: the same rows, cameras, domains, mirror images, and nothing left changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_networks import images, small, write_run

from affscl.data.augmentation import normalise
from affscl.data.datasets import Sample
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
