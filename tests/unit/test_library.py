"""The checkpoints of a replica, without Ray: changing the served one, names."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from ldm_ray.checkpoints.runs import name_of
from ldm_ray.files.paths import to_path
from ldm_ray.service.library import Library
from ldm_ray.service.service import Service
from ldm_ray.service.settings import Settings
from ldm_ray.settings.errors import LdmError
from tests.helpers.asgi import POST, in_process
from tests.helpers.checkpoints import write_checkpoint, write_small_checkpoint


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


def model(folder: Path, name: str, ae_file: Path) -> Path:
    """Writes a run's checkpoint."""
    path = folder / "checkpoints" / f"latent-diffusion-{name}" / "latest.pt"
    path.parent.mkdir(parents=True)
    return write_small_checkpoint(path, ae_file)


def changed(path: Path, **values: object) -> None:
    torch.save(torch.load(path, weights_only=False) | values, path)


def test_numbers_of_a_checkpoint_that_are_none_are_left_out(tmp_path: Path, ae_file: Path) -> None:
    paths = [model(tmp_path, name, ae_file) for name in ("a", "b", "c")]
    changed(paths[0], train_loss=float("nan"), val_loss=float("inf"), epoch=3)
    changed(paths[1], epoch=torch.ones(2), train_loss="low", val_loss=True)
    with in_process(paths[2], outdir=str(tmp_path)) as running:
        assert running.ask("/v1/models/latent-diffusion-a").json["quality"] == {"epoch": 3}
        # The loader may refuse the second; either way the list is JSON.
        other = running.ask("/v1/models/latent-diffusion-b")
        assert other.status == 503 or other.json["quality"] == {}
        listed = running.ask("/v1/models")
        assert listed.status == 200 and {each["id"] for each in listed.json["data"]} == {
            f"latent-diffusion-{name}" for name in "abc"
        }


@pytest.mark.parametrize("only", [3.5, "7", -1, 10, True, [7]])
def test_a_checkpoint_of_no_digit_does_not_load_and_holds_up_nobody(
    tmp_path: Path, ae_file: Path, only: object
) -> None:
    good, bad = (model(tmp_path, name, ae_file) for name in ("good", "bad"))
    write_small_checkpoint(bad, ae_file, only_digit=only)
    with in_process(good, outdir=str(tmp_path)) as running:
        started = time.monotonic()
        assert running.ask(POST, {"model": "latent-diffusion-bad"}).status == 503
        assert time.monotonic() - started < 20
        assert running.ask(POST, {"prompt": "7"}).status == 200


def test_a_model_whose_file_is_deleted_goes_on_while_it_is_loaded(tmp_path: Path, ae_file: Path) -> None:
    default, other, third = (model(tmp_path, name, ae_file) for name in ("a", "b", "c"))
    with in_process(default, outdir=str(tmp_path)) as running:
        body = {"model": "latent-diffusion-b", "prompt": "7", "seed": 1}
        before = running.ask(POST, body)
        for path in (default, other, third):
            path.unlink()
        after = running.ask(POST, body)
        assert before.status == after.status == running.ask(POST, {"prompt": "7"}).status == 200
        assert before.json["data"] == after.json["data"]
        assert running.ask("/v1/models/latent-diffusion-b").status == 200
        assert [each["id"][-1] for each in running.ask("/v1/models").json["data"]] == ["a", "b"]
        assert running.ask(POST, body | {"model": "latent-diffusion-c"}).status == 404
        third.symlink_to(tmp_path / "nothing")
        assert running.ask("/v1/models").status == 200


def test_what_is_loaded_does_not_wait_for_what_is_being_loaded(
    tmp_path: Path, ae_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"latent-diffusion-{name}" for name in "abcd"]
    paths = [model(tmp_path, name, ae_file) for name in "abcd"]
    with in_process(paths[0], outdir=str(tmp_path), deadline_s=2.0) as running:
        assert running.ask(POST, {"model": names[1]}).status == 200
        gate, loads, load = threading.Event(), [], Library._load

        def slow(library: Library, path: Path) -> object:
            loads.append(path)
            assert gate.wait(60)
            return load(library, path)

        monkeypatch.setattr(Library, "_load", slow)

        async def crowd() -> tuple[set[int], set[int]]:
            waiting = [asyncio.create_task(running.send(POST, {"model": name})) for name in names[2:] * 10]
            await asyncio.sleep(0.05)
            loaded = await asyncio.gather(*(running.send(POST, {"model": name}) for name in names[:2] * 10))
            assert not any(task.done() for task in waiting)
            late = {answer.status for answer in await asyncio.gather(*waiting)}  # by the deadline, with Retry-After
            gate.set()
            for _ in range(600):
                if not running.service.library._loading:
                    break
                await asyncio.sleep(0.05)
            return {answer.status for answer in loaded}, late

        assert running.run(crowd()) == ({200}, {503})
        assert len(loads) == 2  # once for each, however many wait
        assert running.ask(POST, {"model": names[3]}).status == 200 and len(loads) == 2
