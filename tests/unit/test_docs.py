"""The documentation is true: what it names is there, what is there is named, and what it shows runs."""

import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
from click import Context

from common import errors
from common.errors import FedChordError
from common.queues import AnswerKind, Kind
from common.settings import ENV_PREFIX, Settings
from coordinator.cli.entry import cli
from coordinator.cli.reference import contexts
from coordinator.jobfile import GateTable, InitialModel, JobSpec, StrategyTable
from coordinator.strategies import STRATEGIES
from docs import meanings, method_meanings
from docs.fields import describe_fields
from docs.generate import BLOCKS, REFERENCE, generated_pages
from store.client import Api
from store.documents import model_document, party_document, store_document, upstream_document
from store.local import LocalApi
from store.models import ModelInfo, ModelState
from store.service.codes import CODES
from store.service.methods import DOWNLOAD_METHOD, LOCAL_METHODS, UPLOAD_METHODS
from worker.edge_settings import EdgeSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "compose").rglob("*.md")])
TEXTS = {page: page.read_text("utf-8") for page in PAGES}

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")

WORDS = [
    "site",
    "job",
    "round",
    "part",
    "update",
    "shard",
    "index",
    "blob",
    "slot",
    "lineage",
    "chord",
    "strategy",
    "trainer",
    "gate",
    "quarantine",
    "quorum",
    "deadline",
    "coordinator",
    "party",
    "study",
    "receipt",
    "lease",
    "sweep",
    "heartbeat",
    "outbox",
    "attempt",
    "kit",
    "notice",
    "node",
    "edge",
    "upstream",
    "feedback",
    "transfer",
    "tenant",
    "operator",
    "retention",
    "expired",
    "kept",
]
PHRASES = ("global model", "model store", "test round", "embedded stack", "object store")


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in the language, without their indentation."""
    return [
        "\n".join(line.removeprefix(indent) for line in code.splitlines()) + "\n"
        for indent, found, code in _FENCE.findall(TEXTS[page])
        if found == language
    ]


def reference(name: str) -> str:
    return TEXTS[REFERENCE / name]


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda page: page.name)
def test_generated_page_is_current(page: Path) -> None:
    assert generated_pages()[page] == page.read_text("utf-8"), "run `make docs`"


def test_every_generated_block_has_its_place() -> None:
    places = re.findall(r"<!-- generated: ([a-z-]+) -->", "".join(TEXTS[page] for page in REFERENCE.glob("*.md")))
    assert sorted(places) == sorted(BLOCKS)


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (JobSpec, meanings.JOB),
        (StrategyTable, meanings.STRATEGY),
        (InitialModel, meanings.INITIAL_MODEL),
        (GateTable, meanings.GATE),
        (Settings, {}),
        (EdgeSettings, method_meanings.EDGE),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_has_a_meaning_and_every_meaning_a_field(model: type, known: dict[str, str]) -> None:
    rows = describe_fields(model, known)
    assert [row.name for row in rows if not row.meaning] == []
    assert known.keys() <= {row.name for row in rows}


def test_no_table_has_an_empty_meaning() -> None:
    for page in REFERENCE.glob("*.md"):
        assert not re.search(r"\|\s*\|\s*$", TEXTS[page], re.MULTILINE), page.name


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_setting_is_in_the_reference(name: str) -> None:
    assert f"| `{ENV_PREFIX}{name.upper()}` | `{name}` |" in reference("settings.md")


@pytest.mark.parametrize("name", [name for name, each in vars(errors).items()
                                  if isinstance(each, type) and issubclass(each, FedChordError)])  # fmt: skip
def test_error_is_in_the_reference(name: str) -> None:
    assert f"| `{name}` | {vars(errors)[name].exit_code} |" in reference("errors.md")


SERVER_TO_SERVER = ("get_path", "offer_model", "register_party", "unregister_party", "put_blob")
METHODS = sorted(
    {*LOCAL_METHODS, *(name.removeprefix("fl.") for name in (*UPLOAD_METHODS, DOWNLOAD_METHOD))} - {*SERVER_TO_SERVER}
)


@pytest.mark.parametrize("name", METHODS)
def test_method_is_in_the_reference_with_an_example(name: str) -> None:
    section = reference("model-store.md").partition(f"#### `fl.{name}`")[2].partition("\n###")[0]
    assert f".{name}(" in section


def test_methods_that_servers_call_are_in_the_reference() -> None:
    assert [name for name in SERVER_TO_SERVER if f"`fl.{name}`" not in reference("model-store.md")] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_client_has_the_methods_of_the_service(name: str) -> None:
    here, there = (inspect.signature(getattr(each, name)).parameters for each in (LocalApi, Api))
    assert [(each.name, each.kind, each.default) for each in there.values()] == [
        (each.name, each.kind, each.default) for each in here.values()
    ]


def test_every_parameter_has_a_meaning_and_every_meaning_a_parameter() -> None:
    used = {
        (name, each) for name in METHODS for each in list(inspect.signature(getattr(LocalApi, name)).parameters)[1:]
    }
    assert [each for each in sorted(used) if not method_meanings.parameter(*each)] == []
    known = method_meanings.known_parameters()
    assert known <= used | {each for _, each in used}


def test_documents_in_the_reference_have_the_fields_that_they_have() -> None:
    documents = {
        "model_info": model_document(ModelInfo(store="ddc:a", model_hash="", model_size=0)),
        "ddc_info": store_document(Mock()),
        "upstream_info": upstream_document(Mock()),
        "party_info": party_document(Mock()),
    }
    assert {name: list(fields) for name, fields in method_meanings.DOCUMENTS.items()} == {
        name: list(document) for name, document in documents.items()
    }


@pytest.mark.parametrize("state", list(ModelState))
def test_state_is_in_the_reference(state: ModelState) -> None:
    assert f"| `{state.name}` | {int(state)} |" in reference("model-store.md")


@pytest.mark.parametrize("error", list(CODES), ids=lambda error: error.__name__)
def test_error_code_is_in_the_reference(error: type[FedChordError]) -> None:
    assert f"| {CODES[error][0]} | `{error.__name__}` |" in reference("model-store.md")


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy_is_in_the_reference_with_its_paper(name: str) -> None:
    section = reference("strategies.md").partition(f"## `{name}`")[2].partition("\n## ")[0]
    assert "https://arxiv.org/abs/" in section


@pytest.mark.parametrize("kind", [*Kind, *AnswerKind])
def test_message_kind_is_in_the_reference(kind: str) -> None:
    assert f"### `{kind}`" in reference("messages.md")


@pytest.mark.parametrize(
    "context", list(contexts(Context(cli, info_name="fedchord"))), ids=lambda each: each.command_path
)
def test_command_is_in_the_reference(context: Context) -> None:
    assert f"# {context.command_path}\n" in reference("cli.md")


@pytest.mark.parametrize("word", [*WORDS, *PHRASES])
def test_word_is_in_the_glossary(word: str) -> None:
    assert f"\n**{word}**" in TEXTS[ROOT / "docs" / "glossary.md"]


def test_glossary_is_sorted() -> None:
    words = re.findall(r"^\*\*([^*]+)\*\*", TEXTS[ROOT / "docs" / "glossary.md"], re.MULTILINE)
    assert words == sorted(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(TEXTS[page]):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in _anchors(target.read_text("utf-8")), f"{page.name} links to {link}"


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_names_no_machine_and_no_registry(page: Path) -> None:
    assert not re.search(r"/work/|/root/|/home/\w|/simple/\w|(?i:pypi\.\w)|hosted\.org|download\.\w+\.org", TEXTS[page])


def toml_blocks() -> list[tuple[Path, str]]:
    return [(page, block) for page in PAGES for block in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "block"), toml_blocks(), ids=lambda value: getattr(value, "stem", ""))
def test_toml_is_a_job_file_or_settings_or_an_edge_toml(page: Path, block: str) -> None:
    values = tomllib.loads(block)
    if values.keys() <= Settings.model_fields.keys():
        Settings(**values)
    elif "url" in values:
        EdgeSettings.model_validate(values)
    else:
        required = {"name": "a-job", "trainer": "a-trainer", "rounds": 1}
        JobSpec.model_validate(required | values).strategy.make()


def commands() -> list[tuple[str, list[str]]]:
    """Return every `fedchord …` that stands in a shell block of a page, with the page's name."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:^|[\s/])fedchord((?: .+)?)$", line.partition("  #")[0].strip()):
                    found.append((page.name, shlex.split(match[1])))
    return found


@pytest.mark.parametrize(("page", "arguments"), commands(), ids=lambda value: str(value))
def test_commands_and_options_exist(page: str, arguments: list[str]) -> None:
    context = Context(cli, info_name="fedchord")
    while True:
        flags = {flag: each for each in context.command.params if isinstance(each, click.Option)
                 for flag in (*each.opts, *each.secondary_opts)}  # fmt: skip
        while arguments and arguments[0].startswith("-") and arguments[0] != "--help":
            option = flags[arguments[0]]
            arguments = arguments[1 if option.is_flag else 2 :]
        if not isinstance(context.command, click.Group) or not arguments or arguments[0] == "--help":
            break
        command = context.command.get_command(context, arguments[0])
        assert command is not None, f"{page}: fedchord {arguments[0]}"
        context, arguments = Context(command, parent=context, info_name=arguments[0]), arguments[1:]
    known = {flag for each in context.command.params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
    used = {argument for argument in arguments if argument.startswith("-")}
    assert used <= known


def test_trainers_of_the_howto_run(tmp_path: Path) -> None:
    for block in blocks(ROOT / "docs" / "howto" / "write-a-trainer.md", "python"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, "utf-8")
    ran = subprocess.run(
        [sys.executable, "try_it.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.partition(":")[0] for line in ran.stdout.splitlines()] == ["FlowerNetwork", "FlowerRegression"]
