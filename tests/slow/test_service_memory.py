"""The memory of a replica whose model is changed again and again."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from tests.helpers.asgi import in_process
from tests.helpers.checkpoints import write_checkpoint


def test_memory_is_flat_over_changes_of_the_model(tmp_path: Path, ae_file: Path) -> None:
    paths = [tmp_path / f"{name}.pt" for name in ("a", "b")]
    for path in paths:
        write_checkpoint(path, ae_file)
    with in_process(paths[0], models=1, deadline_s=5) as running:
        library, here, seen = running.service.library, psutil.Process(), []
        for i in range(1, 10):
            old = library.default
            running.run(library.serve(str(paths[i % 2])))
            while old.slots.alive:
                time.sleep(0.01)
            seen.append(here.memory_info().rss / 2**20)
        assert len(library.loaded) == 1
    grown = min(seen[-4:]) - seen[0]
    assert grown < 60, [round(each) for each in seen]  # it was 130 MB
