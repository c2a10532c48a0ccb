"""Train the initial weights that the package ships, from nothing but synthetic people.

    python tools/make_weights.py         about three minutes on two CPU cores

What ImageNet weights are to the paper, these are to the recipes `quick` and `tiny`: a start from which
clusters can form. The people, garments, cameras and light are those of look 1; the recipes train and test
on look 0. Only the backbone is kept, in half precision, in affscl/model/initial/.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from affscl.model.weights import SHIPPED
from affscl.training.config import RECIPES
from affscl.training.loop import train

START = replace(
    RECIPES["quick"],
    recipe="start",
    labels="truth",
    weights=None,
    epochs=10,
    lr_step=8,
    world_look=1,
    world_seed=100,
    world_ids=360,
    seed=0,
    precision="no",  # so that every machine makes the same start
)


def backbone_only(state):
    """The backbone's tensors in half precision."""
    kept = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return {key: value.half() if value.is_floating_point() else value for key, value in kept.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=SHIPPED / f"{START.backbone}_synthetic.safetensors", help="the file to write")
    out = Path(parser.parse_args().out)
    with tempfile.TemporaryDirectory() as folder:
        run = train(START, out=folder).run
        state = backbone_only(load_file(run / "model.safetensors"))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"made_by": "python tools/make_weights.py", "licence": "Apache-2.0"})
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {sum(v.numel() for v in state.values()):,} numbers")


if __name__ == "__main__":
    main()
