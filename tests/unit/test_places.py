"""What the system refuses of files, and standard streams in every state: one line, and never another outcome."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_ray.files import paths, records
from ldm_ray.settings.errors import ConfigError
from ldm_ray.terminal.cli import refused
from tests.helpers.checkpoints import write_small_checkpoint
from tests.helpers.commands import call
from tests.helpers.data import ROOT

PRINTS = """
import sys
from ldm_ray.terminal import cli
def main():
    print("ᾱ → 1", flush=True)
    print("note ü", file=sys.stderr)
    for line in range(20_000):
        print(line)
    open(sys.argv[1], "w").write("done")
    return int(sys.argv[2])
cli.run(main, "prog")
"""


def run(
    redirection: str, made: Path, code: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """A command that prints and then writes a file, in a shell with this after it."""
    script = made.with_suffix(".py")
    script.write_text(PRINTS, "utf-8")
    command = ["bash", "-c", f'"$0" "$1" "$2" {code} {redirection}', sys.executable, str(script), str(made)]
    settings = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    return subprocess.run(command, capture_output=True, env=settings, check=False)


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "1</dev/null", "> >(true)", "2> >(true)"],
)
def test_closed_and_broken_streams_change_no_outcome(tmp_path: Path, redirection: str, code: int) -> None:
    ended = run(redirection, tmp_path / "made", code)
    assert ended.returncode == code and (tmp_path / "made").read_text() == "done"
    assert b"Traceback" not in ended.stderr and b"rror" not in ended.stderr
    if redirection in ("<&-", "2>&-", "2>/dev/full", "2> >(true)"):
        assert ended.stdout.decode().splitlines()[0] == "ᾱ → 1" and ended.stdout.endswith(b"19999\n")


def test_a_full_disk_below_standard_output_is_said_at_the_end(tmp_path: Path) -> None:
    ended = run(">/dev/full", tmp_path / "made")
    assert ended.returncode == 2 and (tmp_path / "made").read_text() == "done"
    assert ended.stderr.decode().splitlines() == [
        "note ü",
        "prog: standard output: No space left on device; the command itself came to its end",
    ]
    assert run(">/dev/full", tmp_path / "made", code=3).returncode == 3


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_streams_of_few_characters_change_no_outcome(tmp_path: Path, environment: dict[str, str]) -> None:
    ended = run("", tmp_path / "made", environment=environment)
    assert ended.returncode == 0 and (tmp_path / "made").read_text() == "done"
    assert rb"\u2192 1" in ended.stdout and ended.stdout.endswith(b"19999\n")


def test_every_help_is_printed_in_ascii() -> None:
    code = "from ldm_ray import train; from ldm_ray.terminal import cli; "
    code += "cli.run(lambda: train.main(['--help']), train.PROG)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment, check=True)
    assert rb"images \u2192 latents" in ended.stdout and not ended.stderr


def test_a_terminal_that_goes_away_changes_no_outcome(tmp_path: Path) -> None:
    """Lines are printed as they come, as on any terminal; after it has gone the command goes on."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "made"), "0"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=ROOT) as process:
        os.close(theirs)
        assert "→ 1" in os.read(ours, 100).decode()
        os.close(ours)
        assert process.wait(60) == 0
    assert (tmp_path / "made").read_text() == "done"


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = "from ldm_ray.terminal import cli; cli.run(lambda: open({!r}, 'w').fileno() < 3, 'prog')".format(
        str(tmp_path / "x")
    )
    assert subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], cwd=ROOT).returncode == 0


# --- places ---

LONG = "a" * 300


@pytest.fixture(scope="module")
def checkpoint(ae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("places") / "latest.pt", ae_file)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    return {
        "no home": "~no-one-here/x",
        "too long": LONG,
        "a loop": str(tmp_path / "loop" / "x"),
        "below a file": str(tmp_path / "file" / "x"),
        "a system's": "/proc/self/no/x",
    }


COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "infer --output": ("infer", ["--ckpt", "CKPT", "--num-images", "1", "--output"], ".png"),
    "infer --ckpt": ("infer", ["--output", "x.png", "--ckpt"], ""),
    "infer --ae-ckpt": ("infer", ["--ckpt", "CKPT", "--output", "x.png", "--ae-ckpt"], ""),
    "infer --config": ("infer", ["--config"], ""),
    "inspect": ("inspect", [], ""),
    "explore --output": (
        "explore",
        ["--ckpt", "CKPT", "--digits", "1", "--seeds", "1,2", "--columns", "2", "--output"],
        ".png",
    ),
    "explore --ckpt": ("explore", ["--ckpt"], ""),
    "generate --requests": ("generate", ["--ckpt", "CKPT", "--requests"], ""),
    "generate --output": ("generate", ["--ckpt", "CKPT", "--requests", "requests.jsonl", "--output"], ""),
    "generate --labels": ("generate", ["--ckpt", "CKPT", "--dry-run", "--labels"], ""),
    "generate verify": ("generate", ["verify"], ""),
    "tsne --output": ("tsne", ["--ckpt", "CKPT", "--dataset", "digits", "--samples", "20", "--output"], ".png"),
    "tsne --dataset": ("tsne", ["--ckpt", "CKPT", "--output", "x.png", "--dataset"], ""),
    "train --outdir": ("train", ["--outdir"], ""),
    "train --ae-ckpt": ("train", ["--outdir", ".", "--ae-ckpt"], ""),
    "train --ae-ckpt-dir": ("train", ["--outdir", ".", "--ae-ckpt-dir"], ""),
    "train_autoencoder --outdir": ("train_autoencoder", ["--outdir"], ""),
    "evaluate --output": ("evaluate", ["--ckpt", "CKPT", "--dataset", "digits", "--output"], ""),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["no home", "too long", "a loop", "below a file", "a system's"])
def test_an_unusable_place_is_one_line(command: str, place: str, places: dict[str, str], checkpoint: Path) -> None:
    """Whatever it is named for: exit code 2, no traceback, the place in the last line."""
    module, flags, ending = COMMANDS[command]
    Path("requests.jsonl").write_text('{"custom_id": "a", "body": {"class_label": 7}}\n')
    prefix = "file:" if command == "generate --labels" else ""
    given = [str(checkpoint) if flag == "CKPT" else flag for flag in flags]
    code, _, errors = call(module, *given, prefix + places[place] + ending)
    message = errors.splitlines()[-1]
    assert code == 2 and message.startswith(f"python -m ldm_ray.{module}") and "Traceback" not in errors
    assert places[place].rpartition("/")[2][:80] in message or places[place].rpartition("/")[0] in message


def test_what_can_be_no_path() -> None:
    for text, words in (("~no-one-here/x", "home folder"), ("a\0b", "no path"), ("a\ud800", "no path")):
        with pytest.raises(ConfigError, match=words):
            paths.to_path(text)
        with pytest.raises(ConfigError, match=words):
            paths.local_path(text)
    assert paths.local_path("~/x") == Path.home() / "x"


def test_a_disk_that_takes_no_more_is_named_and_nothing_half_written_stays(tmp_path: Path) -> None:
    """A limit on the sizes of files stands for a full disk: both refuse a write, and neither says of what."""
    code = """
import resource, signal, sys
from pathlib import Path
from ldm_ray.terminal import cli
from ldm_ray.files import paths
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = Path(sys.argv[1])
def append():
    for _ in range(2000):
        paths.append_line(file.with_name("lines"), "x")
cli.run(append if len(sys.argv) > 2 else lambda: paths.write_bytes(file, bytes(5000)), "prog")
"""
    file = tmp_path / "deep" / "picture.png"
    ended = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, cwd=ROOT, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"prog: {file}: File too large\n")
    assert not list(file.parent.iterdir())
    ended = subprocess.run([sys.executable, "-c", code, str(file), "more"], capture_output=True, cwd=ROOT, text=True)
    assert (ended.returncode, ended.stderr) == (2, f"prog: {file.with_name('lines')}: File too large\n")


def test_words_of_a_refusal() -> None:
    assert refused(OSError(28, "No space left on device")) == "No space left on device"
    assert refused(OSError(18, "Invalid cross-device link", "a", None, "b")) == "a to b: Invalid cross-device link"
    assert refused(FileExistsError(17, "File exists", "a")) == "a: it is there and is no folder"
    assert refused(OSError("odd")) == "odd" and refused(TimeoutError()) == "TimeoutError"


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"epoch": 1, "loss": 0.1}, {"epoch": 2, "name": "ä"}]
    assert records.read_records(file) == []
    records.write_records(file, rows)
    records.append_record(file, {"epoch": 3})
    assert records.read_records(file) == [*rows, {"epoch": 3}] and len(file.read_text().splitlines()) == 3
    with pytest.raises(ValueError):
        records.write_records(file, [{"loss": float("nan")}], finite=True)
    assert len(records.read_records(file)) == 3 and os.listdir(file.parent) == ["rows.jsonl"]


def test_a_fingerprint_follows_from_the_values_alone() -> None:
    assert records.fingerprint({"a": 1, "b": [2]}) == records.fingerprint({"b": [2], "a": 1})
    assert records.fingerprint({}) == "44136fa355b3678a1146ad16"  # as folders of earlier versions are named
    assert records.fingerprint({}, 12) == "44136fa355b3"
