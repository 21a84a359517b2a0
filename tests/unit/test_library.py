"""The checkpoints of a replica, without Ray: changing the served one, names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ldm_ray.errors import LdmError
from ldm_ray.paths import to_path
from serve.library import Library, name_of
from serve.service import Service
from serve.settings import Settings
from tests.helpers.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/runs/seven/latest.pt", "seven"),
        ("/runs/seven/checkpoint_epoch_000003.pt", "seven-checkpoint_epoch_000003"),
        ("/runs/seven/best.pt", "best"),
        ("s3://bucket/runs/seven/best.pt?region=here", "best"),
        ("s3://bucket/runs/seven/latest.pt?region=here", "seven"),
    ],
)
def test_a_model_is_named_by_its_run_or_its_file(path: str, name: str) -> None:
    assert name_of(to_path(path)) == name


def test_a_checkpoint_that_does_not_load_leaves_the_old_one_serving(tmp_path: Path, ae_file: Path) -> None:
    first, second, broken = (tmp_path / f"{name}.pt" for name in ("first", "second", "broken"))
    write_checkpoint(first, ae_file)
    write_checkpoint(second, ae_file, shift=0.1)
    broken.write_bytes(b"no checkpoint")
    service = Service(Settings(ckpt=str(first), outdir=str(tmp_path), threads=1, device="cpu"))
    library: Library = service.library

    async def change() -> None:
        old = library.default
        for bad in (broken, tmp_path / "nothing.pt"):
            with pytest.raises((LdmError, OSError)):
                await library.serve(str(bad))
            assert library.default is old and old.slots.alive
        await library.serve(str(second))
        assert library.default.name == "second" and (await library.get(None)).path == second
        assert (await library.get("first")) is old

    try:
        asyncio.run(change())
    finally:
        service.close()
    assert not library.default.slots.alive
