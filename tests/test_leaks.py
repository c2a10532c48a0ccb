"""A run of many epochs ends with the memory and the open files of its tenth."""

from dataclasses import replace

import psutil
import pytest
from long_forms import LONG

from affscl.training import loop
from affscl.training.config import RECIPES

LITTLE = dict(iterations=1, world_ids=24, world_cams=3, p=4, eval_every=5)
WAYS = {
    "clusters": {},
    "best's options": dict(camera_norm=True, camera_map=True, crossing=True, camera_links=1.0, mirror=True),
    "workers": dict(workers=2),
    "joint": dict(source="synthetic"),
}


@LONG
@pytest.mark.parametrize("way", WAYS)
def test_many_epochs_hold_no_more_than_few(way, tmp_path, monkeypatch):
    process, seen = psutil.Process(), []
    finish = loop.finish_epoch

    def watched(*arguments):
        seen.append((process.memory_info().rss / 1e6, process.num_fds(), len(process.children())))
        return finish(*arguments)

    monkeypatch.setattr(loop, "finish_epoch", watched)
    epochs = 60 if way == "workers" else 200
    loop.train(replace(RECIPES["tiny"], epochs=epochs, lr_step=500, **LITTLE | WAYS[way]), out=tmp_path / "run")
    memory, files, children = zip(*seen[10:])
    print(f"{way}: {memory[0]:.0f} MB, {files[0]} files at first; {memory[-1]:.0f} MB, {files[-1]} files at last")
    assert max(memory[-20:]) < 1.1 * max(memory[:20]) + 20, "MB"
    assert max(files[-20:]) <= max(files[:20]) and max(children[-20:]) <= max(children[:20])
