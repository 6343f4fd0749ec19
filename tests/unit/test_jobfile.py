"""A job file: what is wrong is named with its field, its line and what was expected."""

from pathlib import Path

import pytest

from common.errors import InvalidJobFile
from coordinator.jobfile import JobSpec, find_line, read_job_file

GOOD = """\
name = "digits"
trainer = "digits-mlp"
rounds = 20
sites = ["alpha", "beta", "gamma"]

[config]
local_epochs = 2

[strategy]
name = "fedprox"
mu = 0.1
"""


def read(tmp_path: Path, text: str) -> JobSpec:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return read_job_file(path)


def test_a_good_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    spec = read(tmp_path, GOOD)
    assert spec == JobSpec(
        name="digits",
        trainer="digits-mlp",
        rounds=20,
        sites=("alpha", "beta", "gamma"),
        config={"local_epochs": 2},
        strategy={"name": "fedprox", "mu": 0.1},  # type: ignore[arg-type]
    )
    assert spec.quorum(3) == 2  # more than half
    assert spec.strategy.make().trainer_config() == {"proximal_mu": 0.1}


@pytest.mark.parametrize(
    ("old", "new", "trouble"),
    [
        ("rounds = 20", "", "rounds: is missing"),
        ("rounds = 20", "rounds = -1", "line 3: rounds: Input should be greater than or equal to 0, not -1"),
        ("rounds = 20", 'rounds = "many"', "line 3: rounds: Input should be a valid integer"),
        ("rounds = 20", "rounds = 20\nround = 1", "line 4: round: is not a field of a job file"),
        ("rounds = 20", "rounds = 20\nround_deadline_seconds = 0", "line 4: round_deadline_seconds: .* greater than 0"),
        ("rounds = 20", "rounds = 20\nmin_sites = 4", "min_sites is 4, more than the 3 sites named"),
        ('"beta"', '"Beta"', "line 4: sites: Site name 'Beta' is not valid"),
        ('"beta"', '"alpha"', "line 4: sites: a site is named twice"),
        ('name = "fedprox"', 'name = "fedbest"', "line 10: strategy.name: there is no strategy 'fedbest'"),
        ("mu = 0.1", "mu = -1", "line 11: strategy.mu: Input should be greater than 0"),
        ("mu = 0.1", "nu = 1", "line 11: strategy.nu: Extra inputs are not permitted"),
        ("[config]", '[initial_model]\nfile = "none"\n[config]', "line 7: initial_model.file: there is no file"),
        ("[config]", '[initial_model]\nfile = "a"\nmodel = "b"\n[config]', "give either file or model, not both"),
        ("rounds = 20", "rounds = 20\nmin_sites = 1\nmin_fraction = 0.5", "give min_sites or min_fraction, not both"),
        ("[config]", "[participation]\nover_selection = 1.3\n[config]", "line 6: participation: .* multiple of them$"),
        ("[config]", '[participation]\nchoose = "random"\n[config]', "choose = 'random' needs target_sites"),
        ("[config]", "[participation]\ntarget_sites = 2\ntarget_fraction = 0.5\n[config]", "not both"),
        ("rounds = 20", "rounds = 20\nmin_sites = 3\nparticipation.target_sites = 2", "more than target_sites, 2"),
        ("[config]", '[late]\npolicy = "hope"\n[config]', "line 7: late.policy: .* 'drop', 'count' or 'keep'"),
        ("rounds = 20", "rounds =", r"not valid TOML: Invalid value \(at line 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, trouble: str) -> None:
    with pytest.raises(InvalidJobFile, match=trouble):
        read(tmp_path, GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("fields", "num_sites", "quorum"),
    [
        ("", 10, 6),
        ("min_sites = 4", 10, 4),
        ("min_fraction = 0.5", 10, 5),
        ("min_fraction = 0.7", 10, 7),  # 0.7 * 10 is a little more than 7 to a computer
        ("min_fraction = 0.01", 10, 1),
        ("participation.target_sites = 4", 10, 3),  # more than half of the target
        ("participation.target_sites = 20", 10, 6),
        ("participation.target_fraction = 0.5", 10, 3),
        ("min_fraction = 1\nparticipation.target_sites = 4", 10, 4),
    ],
)
def test_the_quorum(tmp_path: Path, fields: str, num_sites: int, quorum: int) -> None:
    spec = read(tmp_path, GOOD.replace('sites = ["alpha", "beta", "gamma"]', fields))
    assert spec.quorum(num_sites) == quorum


@pytest.mark.parametrize(
    ("fields", "start", "train", "test"),
    [
        ("", 3600, 3600, 3600),
        ("round_deadline_seconds = 60\nround_extension_seconds = 30", 90, 90, 90),
        ("start_deadline_seconds = 10\nround_deadline_seconds = 60", 10, 60, 60),
        ('round_deadline_seconds = 60\nlate.policy = "keep"', 60, 120, 60),
        ('round_deadline_seconds = 60\nlate.policy = "keep"\nlate.within_seconds = 5', 60, 65, 60),
    ],
)
def test_how_long_an_answer_may_count(tmp_path: Path, fields: str, start: float, train: float, test: float) -> None:
    spec = read(tmp_path, GOOD.replace("rounds = 20", f"rounds = 20\n{fields}"))
    assert spec.longest_seconds(start=True, train=False) == start
    assert spec.longest_seconds(start=False, train=True) == train
    assert spec.longest_seconds(start=False, train=False) == test


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobFile, match="Cannot read the job file"):
        read_job_file(tmp_path / "none.toml")


def test_the_initial_model_is_found_beside_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "first.safetensors").touch()
    spec = read(tmp_path, GOOD + '[initial_model]\nfile = "first.safetensors"\n')
    assert spec.initial_model.file == tmp_path / "first.safetensors"


@pytest.mark.parametrize(
    ("field", "line"),
    [(("name",), 1), (("strategy", "name"), 10), (("strategy",), 9), (("config", "none"), 6), (("none",), None)],
)
def test_the_line_of_a_field_is_found(field: tuple[str, ...], line: int | None) -> None:
    assert find_line(GOOD, field) == line
