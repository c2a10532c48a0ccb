"""Processes that begin with torch and the package imported: half a dozen seconds of a core saved for each of them."""

import multiprocessing

FORK = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
FORK.set_forkserver_preload(["affscl.training.loop", "matplotlib.pyplot", "nbdev.test"])
