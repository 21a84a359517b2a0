"""Files that want to choose what is opened, how much memory is taken or how long it takes: one line each, within ten
seconds and 2 GB, measured from outside."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_ray.models import registry
from ldm_ray.models.denoiser import Denoiser
from tests.helpers.bounded import Outcome, outcomes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
MAX_CPU_S, MAX_MB, MAX_OUTPUT = 10.0, 2000.0, 20_000


def autoencoder(**changes: Any) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"model": dict(registry.build("mlp", 16).state_dict()), "args": {"model": "mlp"}} | changes


def denoiser(hidden_dim: int = 8, num_blocks: int = 1, **changes: Any) -> dict[str, Any]:
    return {"model": Denoiser(hidden_dim=hidden_dim, num_blocks=num_blocks).state_dict(), "args": {}} | changes


def shared(levels: int) -> Any:
    """A tuple of two to the power of ``levels`` items that takes a few bytes."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


def with_pickle(data: bytes, entries: dict[str, bytes] | None = None) -> bytes:
    """A torch archive of a pickle that was written by hand."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {
            "a/data.pkl": data,
            "a/byteorder": b"little",
            "a/version": b"3",
            **(entries or {}),
        }.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_bytes(content: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def two_directories() -> bytes:
    """The end record, which Python goes by, and the zip64 one, which others do, name directories of equal length."""
    data = bytearray(torch_bytes(autoencoder()))
    end = len(data) - 22
    size, start = struct.unpack_from("<II", data, end + 12)
    copy = bytes(data[start : start + size])
    moved = data[: start + size] + copy + data[start + size :]
    struct.pack_into("<I", moved, len(moved) - 22 + 16, start + size)
    return bytes(moved)


def overlapping() -> bytes:
    """Two hundred entries that are all the same 4 MB."""
    big = b"\0" * 4_000_000
    data = with_pickle(pickle.dumps({"model": {}}, 2), {"a/data/0": big})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offset, start = archive.getinfo("a/data/0").header_offset, archive.start_dir
    directory, end = data[start:-22], data[-22:]
    at = directory.index(b"a/data/0") - 46
    entry = bytearray(directory[at : at + 46 + len("a/data/0")])
    struct.pack_into("<I", entry, 42, offset)
    more = b"".join(bytes(entry[:46]) + b"a/dat%03d" % i for i in range(200))
    record = bytearray(end)
    count = struct.unpack_from("<H", end, 10)[0] + 200
    struct.pack_into("<HHII", record, 8, count, count, len(directory) + len(more), start)
    return data[:start] + directory + more + bytes(record)


def global_call(name: bytes, argument: bytes) -> bytes:
    """A pickle that calls a name with one argument."""
    return b"\x80\x02c" + name + b"\n(" + argument + b"tR."


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def copies() -> bytes:
    """Ten megabytes that are made into bytes again and again: the file is small, what it asks for is not."""
    start = (
        b"\x80\x02]q\x00("
        + b"c_codecs\nencode\nq\x01"
        + text(b"x" * 10_000_000)
        + b"q\x02"
        + text(b"latin1")
        + b"q\x03"
    )
    return with_pickle(start + b"h\x01h\x02h\x03\x86R" * 100_000 + b"e.")


def cross_keys() -> bytes:
    """A dictionary whose whole-number keys all have the same hash."""
    keys = b"".join(b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") + b"N" for i in range(1, 200_000))
    return with_pickle(b"\x80\x02}(" + keys + b"u.")


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


TERA = b"\x8a\x06" + b"\0" * 5 + b"\x01"  # as a pickle writes 2⁴⁰
WIDE = {"mean": torch.zeros(16), "covariance": torch.diag(torch.full((16,), 1e300, dtype=torch.float64))}
NOT_DEFINITE = torch.eye(16)
NOT_DEFINITE[3, 3] = -1
CASES: dict[str, Callable[[], bytes | dict[str, Any]]] = {
    "two directories": two_directories,
    "overlapping entries": overlapping,
    "bytes before the archive": lambda: b"PK\3\4" + torch_bytes(autoencoder()),
    "a tail": lambda: torch_bytes(autoencoder()) + b"\0" * 100,
    "a name of a megabyte": lambda: autoencoder(data={"class_names": ["x" * 2**20]}, kind="y" * 2**20),
    "a type of a megabyte": lambda: autoencoder(args={"model": "\x1b[31m" + "y" * 2**20}),
    "weights of a long name": lambda: {"model": {"w\n" * 2**19: torch.zeros(3)}, "args": {}},
    "weights of a wrong name": lambda: {"model": {"a\x1b[2J\nb": torch.zeros(3)}, "args": {}},
    "shared tuples": lambda: autoencoder(args={"model": "mlp", "lr": shared(34)}),
    "shared tuples as the epoch": lambda: autoencoder(epoch=shared(34)),
    "shared tuples beside a newer version": lambda: autoencoder(format_version=9, versions={"ldm_ray": shared(34)}),
    "shared lists as weights": lambda: {"model": {"a": list(shared(34))}, "args": {}},
    "a key that takes long to hash": lambda: with_pickle(pickle.dumps({"model": 1, "k": {0: 0}}, 2).replace(
        b"K\x00K\x00s", text(b"x") + b"\x85" + b"q\x63h\x63\x86" * 40 + b"K\x00s")),
    "a key nested a million times": lambda: with_pickle(b"\x80\x02}" + b")" + b"\x85" * 900_000 + b"Ns."),
    "equal hashes": cross_keys,
    "a million names": lambda: with_pickle(
        b"\x80\x02}" + text(b"model") + b"}(" + b"".join(text(b"n%d" % i) + b"N" for i in range(1_000_000)) + b"us."),
    "2,000 blocks": lambda: denoiser(num_blocks=2000),
    "tables of gigabytes": lambda: denoiser(hidden_dim=512, num_blocks=4, args={"T": 100_000, "beta_end": 1e-3}),
    "a long embedding": lambda: {"model": Denoiser(hidden_dim=8, num_blocks=1, embedding_dim=8192).state_dict()},
    "no classes": lambda: {"model": Denoiser(hidden_dim=8, num_classes=0).state_dict(), "args": {}},
    "latents of 4,096 numbers": lambda: {"model": dict(registry.build("mlp", 4096).state_dict()), "args": {}},
    "an image size that is not": lambda: autoencoder(args={"model": "mlp", "image_size": [1024, 1024]}),
    "a byte array of a terabyte": lambda: with_pickle(global_call(b"__builtin__\nbytearray", TERA)),
    "a tensor of a terabyte": lambda: with_pickle(global_call(b"torch\nTensor", TERA)),
    "copies": copies,
    "a memo of four billion": lambda: with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."),
    "a text of four gigabytes": lambda: with_pickle(b"\x80\x02X\xff\xff\xff\xffabc."),
    "a number of a megabyte": lambda: with_pickle(b"\x80\x02\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b"."),
    "float8": lambda: autoencoder(model={"encoder.net.7.weight": torch.zeros(16, 128).to(torch.float8_e4m3fn)}),
    "float4": lambda: autoencoder(
        model={"encoder.net.7.weight": torch.zeros(16, 64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
    "meta": lambda: autoencoder(model={"encoder.net.7.weight": torch.zeros(16, 128, device="meta")}),
    "nested": lambda: autoencoder(model={"encoder.net.7.weight": torch.nested.nested_tensor([torch.zeros(3)])}),
    "quantised": lambda: autoencoder(
        model={"encoder.net.7.weight": torch.quantize_per_tensor(torch.zeros(16, 128), 1.0, 0, torch.qint8)}),
    "a tensor as ema": lambda: denoiser(ema=torch.zeros(3)),
    "a tensor as name": lambda: autoencoder(exp_name=torch.zeros(3)),
    "a tensor as epoch": lambda: autoencoder(epoch=torch.zeros(3)),
    "a tensor as version": lambda: autoencoder(format_version=torch.zeros(3)),
    "a tensor as kind": lambda: autoencoder(kind=torch.zeros(3)),
    "a tensor as arguments": lambda: autoencoder(args=torch.zeros(3)),
    "a tensor as latent size": lambda: autoencoder(args={"latent_dim": torch.zeros(3)}),
    "a digit that is none": lambda: denoiser(args={"only_digit": 3.5}),
    "a digit beyond the classes": lambda: denoiser(args={"only_digit": 11}),
    "a digit as text": lambda: denoiser(args={"only_digit": "3"}),
    "beta at 0": lambda: denoiser(args={"beta_start": 5e-324, "beta_end": 5e-324}),
    "beta at 1": lambda: denoiser(args={"beta_start": 0.5, "beta_end": 1 - 1e-16}),
    "nothing left of the image": lambda: denoiser(args={"beta_start": 0.9, "beta_end": 0.9, "T": 100_000}),
    "numbers beyond float32": lambda: autoencoder(
        model=autoencoder()["model"] | {"encoder.net.1.bias": torch.full((512,), 1e300, dtype=torch.float64)}),
    "statistics beyond float32": lambda: autoencoder(statistics=WIDE),
    "a covariance that is not symmetric": lambda: autoencoder(
        statistics={"mean": torch.zeros(16), "covariance": torch.eye(16) + torch.ones(16, 16).triu(1)}),
    "a negative variance": lambda: autoencoder(statistics={"mean": torch.zeros(16), "covariance": NOT_DEFINITE}),
    "a long header": lambda: safetensors(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "overlapping safetensors": lambda: safetensors(
        b'{"a.b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a.c":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        b"\0" * 24),
    "a shape beyond its bytes": lambda: safetensors(
        b'{"encoder.net.7.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,16]}}', b"\0" * 16),
    "an older file that ends early": lambda: torch_bytes(autoencoder(), _use_new_zipfile_serialization=False)[:-100],
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """``inspect`` of every file."""
    folder = tmp_path_factory.mktemp("hostile")
    commands = []
    for i, make in enumerate(CASES.values()):
        content = make()
        (folder / f"{i}.pt").write_bytes(content if isinstance(content, bytes) else torch_bytes(content))
        commands.append(["ldm_ray.inspect", str(folder / f"{i}.pt")])
    yield dict(zip(CASES, outcomes(commands, folder), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_hostile_files_are_refused_in_one_line_within_bounds(measured: dict[str, Outcome], case: str) -> None:
    seen = measured[case]
    assert seen.code == 2 and seen.output == "", seen
    assert seen.errors.count("\n") == 1 and len(seen.errors) < 1000 and seen.errors[:-1].isprintable(), seen.errors[
        :2000
    ]
    assert seen.errors.startswith("ldm_ray.inspect: checkpoint ")
    assert seen.cpu_s < MAX_CPU_S and seen.mb < MAX_MB, seen


def whole_denoiser(**changes: Any) -> dict[str, Any]:
    """A denoiser of the project's own format, as large as its tables may be, with its autoencoder."""
    inside = {"type": "mlp", "latent_dim": 16, "path": "x", "sha256": "0", "model": autoencoder()["model"]}
    own = {"format_version": 1, "kind": "latent_diffusion", "autoencoder": inside}
    return denoiser(hidden_dim=512, num_blocks=4, args={"T": 8000, "beta_end": 1e-3}) | own | changes


def test_the_largest_tables_that_are_taken_are_within_bounds(tmp_path: Path) -> None:
    torch.save(whole_denoiser(), tmp_path / "d.pt")
    arguments = ["--ckpt", str(tmp_path / "d.pt"), "--num-images", "1", "--output", str(tmp_path / "o.png")]
    (seen,) = outcomes([["ldm_ray.infer", *arguments]], tmp_path)
    assert seen.code == 0 and (tmp_path / "o.png").is_file(), seen
    assert seen.cpu_s < MAX_CPU_S and seen.mb < MAX_MB, seen


def test_inspect_prints_bounded_text(tmp_path: Path) -> None:
    names = [f"{i:05}" + "x" * 90 for i in range(4096)]
    loud = {"lr": "\x1b[31m\n" * 1000, "\x07bell": ["y" * 5000] * 100, "dir": "z" * 10_000}
    torch.save(whole_denoiser(config=loud, data={"class_names": names}, exp_name="a\rb"), tmp_path / "d.pt")
    plain, structured = outcomes(
        [["ldm_ray.inspect", str(tmp_path / "d.pt"), *more] for more in ([], ["--json"])], tmp_path
    )
    assert plain.code == structured.code == 0, plain
    assert len(plain.output) < MAX_OUTPUT and len(structured.output) < 2_000_000
    assert plain.output.replace("\n", "").isprintable() and structured.output.replace("\n", "").isprintable()
    assert json.loads(structured.output)["config"]["dir"] == "z" * 4096 + "…"
