"""Settings and flags."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm_ray.engine.schema import GenerationRequest
from ldm_ray.files.paths import cache_dir, outdir
from ldm_ray.service.schemas import Permalink
from ldm_ray.settings.errors import ConfigError
from ldm_ray.settings.limits import MAX_GUIDANCE, MAX_STEPS
from ldm_ray.settings.options import Config, flag_of, kind_of, option
from ldm_ray.settings.sampling import DEFAULT_STEPS, InferConfig, SamplingConfig
from ldm_ray.settings.training import AutoencoderConfig, RunConfig, TrainConfig
from ldm_ray.terminal.flags import Parser, parse_config

CONFIGS: list[type[Config]] = [AutoencoderConfig, TrainConfig, InferConfig, SamplingConfig]
FIELDS = [(config, field) for config in CONFIGS for field in dataclasses.fields(config)]
CONTRACT: dict[str, Any] = {  # flag → default, as users of the earlier version know them
    "cache-dir": None,
    "outdir": None,
    "ae-ckpt": None,
    "ae-ckpt-dir": None,
    "only-digit": None,
    "epochs": 20,
    "batch-size": 128,
    "lr": 2e-4,
    "T": 1000,
    "beta-start": 1e-4,
    "beta-end": 2e-2,
    "hidden-dim": 256,
    "samples-per-epoch": 16,
    "seed": 42,
    "device": None,
    "amp": False,
    "generate-images": False,
    "auto-resume": False,
    "early-stopping-patience": 0,
    "dataset": "auto",
}
INFER_CONTRACT: dict[str, Any] = {
    "ckpt": None,
    "ae-ckpt": None,
    "num-images": 64,
    "digit": None,
    "device": None,
    "show-process": False,
    "seed": 42,
}


def parse(config: type[Any], *argv: str) -> Any:
    return parse_config(config, Parser(prog="x"), argv)


@pytest.mark.parametrize(("config", "contract"), [(TrainConfig, CONTRACT), (InferConfig, INFER_CONTRACT)])
def test_flags_and_defaults_are_the_contract(config: type[Config], contract: dict[str, Any]) -> None:
    classic = ["--recipe", "classic"] if config is TrainConfig else []
    told = parse(config, *classic)
    defaults = {flag_of(field): getattr(told, field.name) for field in dataclasses.fields(config)}
    assert {flag: defaults.get(flag, "missing") for flag in contract} == contract
    assert parse(config) == config()


@pytest.mark.parametrize("config", [TrainConfig, AutoencoderConfig])
def test_a_recipe_gives_what_is_not_said(config: type[Any], tmp_path: Path) -> None:
    best, classic = config(), config(recipe="classic")
    assert best.recipe == "best" and best.lr > classic.lr and classic.batch_size == 128
    for name, row in config.recipe_table.items():
        assert (getattr(best, name), getattr(classic, name)) == row[:2]
    if config is TrainConfig:
        for recipe, column in (("best", 2), ("classic", 3)):
            pixels = config(recipe=recipe, space="pixel")
            assert all(getattr(pixels, name) == row[column] for name, row in config.recipe_table.items())
    assert config(recipe="classic", lr=0.5).lr == config(lr=0.5).lr == 0.5
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"recipe": "classic", "epochs": 3}))
    read = parse(config, "--config", str(file), "--lr", "0.5")
    assert (read.epochs, read.lr, read.batch_size) == (3, 0.5, 128)
    assert config(**classic.to_dict()) == classic


@pytest.mark.parametrize("config", [TrainConfig, AutoencoderConfig])
def test_every_setting_without_a_default_has_one_in_its_recipe(config: type[Any]) -> None:
    """And only those: a setting has one home for its default."""
    without = {f.name for f in dataclasses.fields(config) if f.default is None and "None" not in str(f.type)}
    assert without == set(config.recipe_table)


def test_a_recipe_is_the_page_of_the_docs() -> None:
    """Each cell of the two tables of docs/experiments.md that is a plain value."""
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    for config, heading in ((TrainConfig, "| `train` |"), (AutoencoderConfig, "| `train_autoencoder` |")):
        lines = page[page.index(heading) :].split("\n\n")[0].splitlines()[2:]
        rows = {cells[1].strip(): cells[2:4] for line in lines if (cells := line.split("|"))}
        checked = 0
        for flags, cells in rows.items():
            names = [flag.strip("` -").replace("-", "_") for flag in flags.split(",")]
            for cell, recipe in zip(cells, ("best", "classic"), strict=True):
                made = config(recipe=recipe)
                for name, text in zip(names, cell.split(","), strict=False):
                    value = getattr(made, name, None)
                    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                        word = re.split(r"[:;]", text.strip())[0]
                        assert word == str(value) or float(word) == value, (flags, cell)
                        checked += 1
        assert checked == {TrainConfig: 14, AutoencoderConfig: 4}[config]


def test_flags_and_http_have_the_same_bounds() -> None:
    rules = {field.name: field.metadata for field in dataclasses.fields(SamplingConfig)}
    generation, permalink = GenerationRequest.model_json_schema(), Permalink.model_json_schema()
    for schema, names in (
        (generation, ("guidance_scale", "num_inference_steps", "sampler")),
        (permalink, ("guidance", "steps", "sampler")),
    ):
        guidance, steps, sampler = (schema["properties"][name]["anyOf"][0] for name in names)
        assert (guidance["minimum"], guidance["maximum"]) == (0, rules["guidance_scale"]["high"]) == (0, MAX_GUIDANCE)
        assert (steps["minimum"], steps["maximum"]) == (rules["num_inference_steps"]["low"], MAX_STEPS) == (1, 1000)
        assert tuple(sampler["enum"]) == rules["sampler"]["choices"] == tuple(DEFAULT_STEPS)
    for name in ("eta", "guidance_start", "timestep_spacing"):
        field, rule = generation["properties"][name]["anyOf"][0], rules[name]
        bounds = field.get("minimum"), field.get("maximum"), field.get("exclusiveMaximum")
        assert bounds == (rule.get("low"), rule.get("high"), rule.get("below")), name
        assert field.get("enum") == (list(rule["choices"]) if rule.get("choices") else None), name
    stated = dict(re.findall(r"(\w+): (\w+)", rules["num_inference_steps"]["help"]))
    assert stated == {"dpmpp_2m_sde": "10", "unipc": "9", "dpmpp_2m": "8", "ddim": "20", "ddpm": "T"}


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [("int", int), ("float | None", float), ("tuple[str, ...] | None", str), ("bool", bool), (int | None, int)],
)
def test_the_type_of_a_setting_is_that_of_its_annotation(annotation: Any, kind: type) -> None:
    made = dataclasses.make_dataclass("Group", [("x", annotation, option(None, "help"))])
    assert kind_of(dataclasses.fields(made)[0]) is kind


@pytest.mark.parametrize("config", CONFIGS)
def test_every_flag_is_read_from_the_command_line(config: type[Config]) -> None:
    for field in dataclasses.fields(config):
        flag, kind = f"--{flag_of(field)}", kind_of(field)
        if kind is bool:
            assert getattr(parse(config, flag), field.name) is True
            assert getattr(parse(config, f"--no-{flag_of(field)}"), field.name) is False
            continue
        value = field.metadata.get("choices", {int: (9,), float: (0.019,), str: ("3",)}[kind])[-1]
        beside = ["--sampler", "ddim"] if field.name == "eta" else []
        assert getattr(parse(config, flag, str(value), *beside), field.name) == value


def wrong_values(field: dataclasses.Field) -> Iterator[Any]:
    rules, kind = field.metadata, kind_of(field)
    yield from {
        bool: ["true", 1, 0],
        int: ["3", "x", 2.0, 2.5, True, [1], float("nan")],
        float: ["0.1", True, float("nan"), float("inf"), 10**400, [0.1]],
        str: ["", True, 1.5, ["a"], {}],
    }[kind]
    if field.default is not None:  # None of a field by recipe is that of the recipe
        yield None
    if "choices" in rules:
        yield "nonsense"
    for rule, step in (("low", -1), ("high", 1), ("above", 0), ("below", 0)):
        if rule in rules:
            yield rules[rule] + (step if kind is int else step / 1000)


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=[f"{c.__name__}-{f.name}" for c, f in FIELDS])
def test_every_wrong_value_is_refused_in_one_line(config: type[Config], field: dataclasses.Field) -> None:
    for value in wrong_values(field):
        with pytest.raises(ConfigError) as error:
            config(**{field.name: value})
        assert f"--{flag_of(field)}" in str(error.value) and "\n" not in str(error.value), repr(value)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0.1, "beta_end": 0.01},
        {"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.01},
        {"num_workers": "0"},
        {"num_workers": "4-2"},
        {"num_workers": "a"},
        {"num_workers": "1-"},
        {"num_workers": "1-200", "batch_size": 128},
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**settings)


def test_a_beta_that_is_given_has_an_effect() -> None:
    assert TrainConfig().beta_schedule == "squaredcos_cap_v2"
    assert TrainConfig(beta_end=1e-2).beta_schedule == "linear"
    assert TrainConfig(beta_start=1e-3).beta_schedule == "linear"
    assert TrainConfig(beta_start=1e-4, beta_end=2e-2).beta_schedule == "linear"
    assert TrainConfig(prediction_type="epsilon").beta_schedule == "linear"
    assert TrainConfig(prediction_type="sample").beta_schedule == "squaredcos_cap_v2"
    assert TrainConfig(beta_schedule="scaled_linear", beta_end=1e-2).beta_end == 1e-2
    assert TrainConfig(**TrainConfig().to_dict()) == TrainConfig()


def test_worker_range() -> None:
    assert TrainConfig(num_workers="3").worker_range() == (3, 3)
    assert TrainConfig(num_workers="1-4").worker_range() == (1, 4)


def test_settings_go_by_the_names_of_flags_and_of_fields() -> None:
    def named(settings: dict[str, Any]) -> TrainConfig:
        return TrainConfig(**TrainConfig.by_field(settings, "f.json"))

    by_flag = named({"T": 500, "batch-size": 64, "lr": 1})
    assert by_flag == named({"num_train_timesteps": 500, "batch_size": 64, "lr": 1.0})
    assert by_flag == TrainConfig(num_train_timesteps=500, batch_size=64, lr=1.0) and isinstance(by_flag.lr, float)
    assert named(by_flag.to_dict()) == by_flag
    assert named(json.loads(json.dumps(by_flag.to_dict()))) == by_flag
    with pytest.raises(ConfigError, match=r"f\.json has an unknown setting 'learning_rate'; known are: .*batch_size"):
        named({"learning_rate": 1})


def test_differences_name_what_a_resume_may_not_change() -> None:
    recorded = TrainConfig(recipe="classic").to_dict()
    assert (
        TrainConfig(recipe="classic", epochs=99, device="cpu", outdir="/x", num_workers="2").differences(recorded) == []
    )
    assert TrainConfig(recipe="classic", lr=1e-3, num_train_timesteps=10).differences(recorded) == [
        "--lr 0.0002 then, 0.001 now",
        "--T 1000 then, 10 now",
    ]
    assert TrainConfig(lr=1e-3).differences({"seed": 42}) == []  # nothing recorded, nothing to compare


def test_what_may_change_at_a_resume_is_the_same_for_every_training_command() -> None:
    for field in dataclasses.fields(RunConfig):
        rules = {
            config: next(f for f in dataclasses.fields(config) if f.name == field.name).metadata.get("resume")
            for config in (TrainConfig, AutoencoderConfig)
        }
        assert len(set(rules.values())) == 1, field.name
    assert AutoencoderConfig(epochs=99).differences(AutoencoderConfig(epochs=2).to_dict()) == []
    assert AutoencoderConfig(epochs=2).differences(AutoencoderConfig().to_dict()) == []
    assert AutoencoderConfig(lr=1e-3).differences(AutoencoderConfig().to_dict()) == ["--lr 0.004 then, 0.001 now"]


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_default_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SCRATCH", "SLURM_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert (outdir(None), cache_dir(None)) == (tmp_path / "outputs", tmp_path / "hf_cache")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("SLURM_TMPDIR", "/localscratch/1")
    assert (outdir(None), cache_dir(None)) == (Path("/scratch/me"), Path("/localscratch/1"))
    assert (outdir("here"), cache_dir("/there")) == (tmp_path / "here", Path("/there"))
    assert list(tmp_path.iterdir()) == []


# --- the command line ---


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"T": 200, "lr": 0.01, "amp": true, "epochs": 5}')
    config = parse(TrainConfig, "--config", str(file), "--lr", "1e-3", "--no-amp", "--batch-size", "1e3")
    assert config == TrainConfig(num_train_timesteps=200, epochs=5, lr=1e-3, batch_size=1000)
    file.write_text('{"beta_start": 0.05, "lr": "wrong"}')  # only what comes out has to be right
    config = parse(TrainConfig, "--config", str(file), "--beta-end", "0.1", "--lr", "0.5")
    assert (config.beta_start, config.beta_end, config.lr) == (0.05, 0.1, 0.5)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"lr": "x"}', '{"nonsense": 1}', "\xff", "[" * 100_000])
def test_unusable_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, "--config", str(tmp_path / "run.json"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(TrainConfig, "--config", str(tmp_path))


@pytest.mark.parametrize(
    "argv", [["--lr", "fast"], ["--T", "1.5"], ["--T", "nan"], ["--T", "²"], ["--epochs", "1e400"]]
)
def test_values_that_are_no_numbers(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{argv[0]} is a .*number"):
        parse(TrainConfig, *argv)


@pytest.mark.parametrize("argv", [["--nonsense"], ["--epoch", "3"], ["--lr"], ["loose"]])
def test_unknown_flags_are_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, *argv)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == "" and shown.err.count("\n") == 1 and argv[0] in shown.err


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--epoch", "3"], "--epochs"), (["--batchsize=3"], "--batch-size"), (["--only_digit", "3"], "--only-digit"),
        (["-lr", "3"], "--lr"), (["--patience", "3"], "--early-stopping-patience"),
        (["--nonsense"], None), (["loose"], None),
    ],
)  # fmt: skip
def test_a_flag_that_resembles_another_is_asked_about(
    argv: list[str], meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, *argv)
    said = capsys.readouterr().err
    assert (f"did you mean {meant}?" if meant else argv[0]) in said and ("did you mean" in said) == bool(meant)


def test_a_denoiser_too_large_to_be_opened_is_refused_before_it_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"T 100000 × 4 blocks × hidden size 256: at most"):
        TrainConfig(num_train_timesteps=100_000)
    with pytest.raises(ConfigError, match=r"4 blocks of hidden size 8192 have more than 201,326,592 weights"):
        TrainConfig(hidden_dim=8192, num_train_timesteps=500)
    TrainConfig(hidden_dim=4096)
