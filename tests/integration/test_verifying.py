"""`fedchord verify` over models of a real coordinator: recomputed, they are the same to the bit, or it tells."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from sqlalchemy import delete, update

from common.errors import Conflict
from common.messages import SwagRoundStart
from coordinator.submitting import submit
from coordinator.verifying import Result, Verdict, verify
from store.blobs import Blob
from store.database import reading, writing
from store.folder import FolderStore
from store.garbage import remove_unused
from store.models import ModelInfo, ModelState, add_model, find_models, get_model, new_model_id
from store.tables import model_info, utc_now
from tests.federation import ROOT, Federation, Tensors, clean_environment, federation
from tests.servers import juicefs

NAMES = ("alpha", "beta", "gamma")
ROUNDS = 3

_variants = itertools.count()  # of the jobs


def train(site: str, variant: int, number: int, _model: Tensors) -> tuple[Tensors, int]:
    """Give some tensors, of which the large ones fill a shard each; every variant has blobs of its own."""
    values = np.random.default_rng((NAMES.index(site), number, variant))
    made = {name: values.standard_normal(size).astype(np.float32) for name, size in
            (("a", 1000), ("b", 300_000), ("c", 20), ("d", 200_000))}  # fmt: skip
    return {**made, "n": np.array(number, np.int64)}, 1 + NAMES.index(site)


@dataclass
class Trained:
    """A federation and the job that it has done."""

    made: Federation
    job_id: str

    def models(self, kind: str) -> tuple[ModelInfo, ...]:
        """Return the job's models of the kind, the newest first."""
        with reading(self.made.services.engine) as connection:
            return find_models(connection, job_id=self.job_id, kind=kind)

    def verify(self, model_id: str | None = None, **options: Any) -> list[Verdict]:
        """Verify the model, or the newest global one."""
        return list(verify(self.made.services, model_id or self.models("global")[0].model_id, **options))

    def path(self, blob: Blob) -> Path:
        """Return the blob's file."""
        store = self.made.services.blobs
        assert isinstance(store, FolderStore)
        return store.folder / "blobs" / blob.digest

    def an_update(self, of: ModelInfo) -> ModelInfo:
        """Return the last update that the model was made of."""
        with reading(self.made.services.engine) as connection:
            return get_model(connection, of.parents[-1])

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `fedchord verify` on the newest global model."""
        command = [sys.executable, "-c", "from coordinator.cli import main; main()", "--config", str(self.made.config)]
        return subprocess.run(
            [*command, "verify", self.models("global")[0].model_id[:8], *arguments],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


def do_job(made: Federation, **spec: Any) -> Trained:
    """Train a job to its end at sites that follow a script."""
    variant = next(_variants)
    with ExitStack() as stack:
        for name, site in made.sites.items():
            stack.enter_context(site.serving(partial(train, name, variant)))
        job = submit(made.services, made.spec(rounds=ROUNDS, **spec))
        ended = made.wait(job.job_id, "completed", "failed")
    assert ended.state == "completed", ended.reason
    return Trained(made=made, job_id=job.job_id)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites and a coordinator process."""
    folder = tmp_path_factory.mktemp("verifying")
    with federation(folder, *NAMES, shard_megabytes=1) as made, made.coordinator():
        yield made


@pytest.fixture
def trained(running: Federation) -> Trained:
    """Give a job that is done."""
    return do_job(running)


def test_a_global_model_recomputed_from_its_updates_is_the_same_to_the_bit(trained: Trained) -> None:
    (model, *_) = trained.models("global")
    assert len(model.shards) > 1
    (verdict,) = trained.verify()
    assert (verdict.result, verdict.updates, verdict.model_id) == (Result.SAME, 3, model.model_id)
    updates = [each for each in trained.models("update") if each.model_id in model.parents]
    hashed = {blob for each in (model, *updates) for blob in each.shards}
    assert verdict.blobs == len(hashed) + 4  # and an index each
    assert verdict.bytes > sum(blob.size for blob in hashed)


def test_it_leaves_nothing_behind(trained: Trained) -> None:
    store = trained.made.services.blobs
    before = sorted(blob.digest for blob in store.blobs())
    assert trained.verify()[0].result is Result.SAME
    assert sorted(blob.digest for blob in store.blobs()) == before
    assert list(store.scratch().iterdir()) == []


def test_the_whole_chain_is_every_global_model_down_to_the_first(trained: Trained) -> None:
    verdicts = trained.verify(whole_chain=True)
    assert [verdict.result for verdict in verdicts] == [Result.SAME] * ROUNDS + [Result.INTACT]
    expected = [*trained.models("global"), *trained.models("initial")]
    assert [verdict.model_id for verdict in verdicts] == [model.model_id for model in expected]


def test_another_size_of_shards_in_the_settings_changes_nothing(trained: Trained) -> None:
    services = trained.made.services
    other = replace(services, settings=services.settings.model_copy(update={"shard_megabytes": 256}))
    (verdict,) = verify(other, trained.models("global")[0].model_id)
    assert verdict.result is Result.SAME


@pytest.mark.parametrize("strategy", [{"name": "fedmedian"}, {"name": "fedprox", "mu": 0.1}], ids=str)
def test_the_strategy_is_the_one_of_the_models_record(running: Federation, strategy: dict[str, Any]) -> None:
    (verdict,) = do_job(running, strategy=strategy).verify()
    assert verdict.result is Result.SAME
    assert strategy["name"] in verdict.sentence


@pytest.fixture(scope="module")
def stepped(running: Federation) -> Trained:
    """Give a job of a server optimizer; its large tensors, and their moments, fill a shard each."""
    return do_job(running, strategy={"name": "fedadam", "server_learning_rate": 0.5})


def kept_by(trained: Trained, model: ModelInfo) -> ModelInfo:
    """Return what the optimizer has kept with the model."""
    with reading(trained.made.services.engine) as connection:
        return get_model(connection, model.model_meta["optimizer"]["model_id"])


def test_what_a_server_optimizer_keeps_is_recomputed_with_its_model(stepped: Trained) -> None:
    verdicts = stepped.verify(whole_chain=True)
    assert [(each.result, each.updates) for each in verdicts] == [(Result.SAME, 3)] * ROUNDS + [(Result.INTACT, 0)]
    assert verdicts[0].sentence.endswith("it is the same to the bit, and so is what the optimizer keeps.")
    state = kept_by(stepped, stepped.models("global")[0])
    assert len(state.shards) > 2
    (verdict,) = stepped.verify(state.model_id)
    assert verdict.result is Result.INTACT
    assert "is recomputed with the round's global model" in verdict.sentence


def test_moments_that_were_changed_with_their_records_are_told(stepped: Trained) -> None:
    newest, second, first = stepped.models("global")
    services = stepped.made.services
    wrong = kept_by(stepped, first)
    named = {"model_id": wrong.model_id, "digest": wrong.model_hash, "strategy": "fedadam"}
    forged = replace(second, model_id=new_model_id(), job_id=None, model_meta=second.model_meta | {"optimizer": named})
    with writing(services.engine) as connection:
        add_model(connection, forged)
    (verdict,) = stepped.verify(forged.model_id)
    assert verdict.result is Result.DIFFERENT
    assert verdict.troubles[0].startswith("What the optimizer keeps: Tensor 'first/a': ")
    named = {**named, "digest": newest.model_meta["optimizer"]["digest"]}
    forged = replace(second, model_id=new_model_id(), job_id=None, model_meta=second.model_meta | {"optimizer": named})
    with writing(services.engine) as connection:
        add_model(connection, forged)
    (verdict,) = stepped.verify(forged.model_id)
    assert verdict.result is Result.DIFFERENT
    assert verdict.troubles[0].startswith(f"Model {wrong.model_id} is not what the optimizer kept: ")


def test_moments_that_are_damaged_or_deleted_are_told(running: Federation) -> None:
    trained = do_job(running, strategy={"name": "fedyogi"})
    _, second, first = trained.models("global")
    state, before = kept_by(trained, second), kept_by(trained, first)
    with writing(running.services.engine) as connection:
        connection.execute(delete(model_info).where(model_info.c.model_id == before.model_id))
    (verdict,) = trained.verify(second.model_id)
    assert verdict.result is Result.MISSING
    assert verdict.troubles == (f"What the optimizer kept before it ({before.model_id}) was deleted.",)
    trained.path(state.shards[0]).chmod(0o644)
    os.truncate(trained.path(state.shards[0]), 100)
    (verdict,) = trained.verify(second.model_id)
    assert verdict.result is Result.DIFFERENT
    assert "of what the optimizer keeps: " in verdict.troubles[0]


def test_an_update_has_nothing_to_recompute_and_is_intact(trained: Trained) -> None:
    (verdict,) = trained.verify(trained.models("update")[0].model_id)
    assert verdict.result is Result.INTACT
    assert "made it, so there is nothing to recompute" in verdict.sentence
    (verdict,) = trained.verify(trained.models("initial")[0].model_id)
    assert verdict.result is Result.INTACT


def test_an_update_whose_bytes_were_changed_is_told_by_its_digest(trained: Trained) -> None:
    blob = trained.an_update(trained.models("global")[0]).shards[0]
    path = trained.path(blob)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    (verdict,) = trained.verify()
    assert verdict.result is Result.DIFFERENT
    (trouble,) = verdict.troubles
    assert blob.digest in trouble
    assert "the update of gamma" in trouble


def test_a_model_cut_short_is_damaged(trained: Trained) -> None:
    (model, *_) = trained.models("global")
    trained.path(model.shards[0]).chmod(0o644)
    os.truncate(trained.path(model.shards[0]), 100)
    (verdict,) = trained.verify()
    assert verdict.result is Result.DIFFERENT
    assert "is damaged in the store" in verdict.troubles[0]


def test_other_numbers_of_examples_than_were_used_make_another_model(trained: Trained) -> None:
    (model, *_) = trained.models("global")
    with writing(trained.made.services.engine) as connection:
        changed = update(model_info).where(model_info.c.model_id == model.parents[-1]).values(num_examples=7)
        connection.execute(changed)
    (verdict,) = trained.verify()
    assert verdict.result is Result.DIFFERENT
    assert "it is another model than the one that is stored" in verdict.sentence
    assert verdict.troubles[0].startswith("Tensor 'a': ")
    assert "element 0 is" in verdict.troubles[0]
    assert verdict.troubles[-1] == "4 of 5 tensors differ."  # the largest counter is the same


def test_an_update_that_was_deleted_is_missing_and_the_rest_of_the_chain_is_looked_at(trained: Trained) -> None:
    newest, second, *_ = trained.models("global")
    with writing(trained.made.services.engine) as connection:
        connection.execute(delete(model_info).where(model_info.c.model_id == second.parents[1]))
    results = [verdict.result for verdict in trained.verify(whole_chain=True)]
    assert results == [Result.SAME, Result.MISSING, Result.SAME, Result.INTACT]
    (verdict,) = trained.verify(second.model_id)
    assert verdict.troubles == (f"The update of alpha ({second.parents[1]}) was deleted.",)
    with writing(trained.made.services.engine) as connection:
        connection.execute(delete(model_info).where(model_info.c.model_id == newest.parents[0]))
    results = [verdict.result for verdict in trained.verify(whole_chain=True)]
    assert results == [Result.SAME, Result.MISSING]


def test_a_blob_that_was_deleted_is_missing(trained: Trained) -> None:
    blob = trained.an_update(trained.models("global")[0]).shards[1]
    trained.made.services.blobs.delete(blob.digest)
    (verdict,) = trained.verify()
    assert verdict.result is Result.MISSING
    assert verdict.troubles == (f"Blob {blob.digest} of the update of gamma is not in the object store any more.",)


def test_what_has_expired_is_told_with_its_reason_and_only_once_its_bytes_are_gone(trained: Trained) -> None:
    services = trained.made.services
    second = trained.models("global")[1]
    update_of_gamma = trained.an_update(second)
    expired = {"expired_at": utc_now(), "expired_reason": "keep_updates_days is 30, and its job ended longer ago."}
    with writing(services.engine) as connection:
        is_it = model_info.c.model_id == update_of_gamma.model_id
        connection.execute(update(model_info).where(is_it).values(**expired))
    assert trained.verify(second.model_id)[0].result is Result.SAME
    remove_unused(services.engine, services.blobs, older_than_seconds=0)
    assert [verdict.result for verdict in trained.verify()] == [Result.SAME]
    (verdict,) = trained.verify(second.model_id)
    assert verdict.result is Result.EXPIRED
    (trouble,) = verdict.troubles
    assert trouble.startswith("The update of gamma expired on 20")
    assert trouble.endswith(expired["expired_reason"])
    with pytest.raises(Conflict, match=r"expired on 20.*models keep"):
        submit(services, trained.made.spec(initial_model={"model": update_of_gamma.model_id}))


def test_a_parent_that_is_no_update_of_that_site_is_told(trained: Trained) -> None:
    (model, *_) = trained.models("global")
    parents = [*model.parents[:-1], trained.models("global")[1].parents[1]]
    with writing(trained.made.services.engine) as connection:
        connection.execute(update(model_info).where(model_info.c.model_id == model.model_id).values(parents=parents))
    (verdict,) = trained.verify()
    assert verdict.result is Result.DIFFERENT
    assert "is not the update of gamma" in verdict.troubles[0]


def test_the_command_says_by_its_exit_code_what_it_found(trained: Trained) -> None:
    same = trained.run("--all", "--json")
    assert same.returncode == 0, same.stderr
    told = json.loads(same.stdout)
    assert told["result"] == "same"
    assert [model["result"] for model in told["models"]] == ["same", "same", "same", "intact"]

    gone = trained.an_update(trained.models("global")[0])
    with writing(trained.made.services.engine) as connection:
        connection.execute(delete(model_info).where(model_info.c.model_id == gone.model_id))
    missing = trained.run()
    assert missing.returncode == 3, missing
    assert f"The update of gamma ({gone.model_id}) was deleted." in missing.stdout

    blob = trained.models("global")[0].shards[0]
    trained.path(blob).chmod(0o644)
    with trained.path(blob).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert trained.run().returncode == 1


def test_moments_are_recomputed_too(running: Federation) -> None:
    alpha, beta = running.sites["alpha"], running.sites["beta"]
    for site in (alpha, beta):
        site.forget()  # what a job before this one has left
    job = submit(running.services, running.spec(sites=("alpha", "beta"), min_sites=2, swag=True))
    first = {"w": np.zeros(3, np.float32)}
    for site in (alpha, beta):
        site.start(first)
    for value, site in enumerate((alpha, beta)):
        site.answer(site.receive(), {"w": np.full(3, value, np.float32)}, num_examples=3 + value)
    for value, site in enumerate((alpha, beta)):
        message = site.receive()
        assert isinstance(message, SwagRoundStart)
        moments = {f"{moment}/w": np.full(3, value, np.float32) for moment in ("first", "second")}
        site.answer(message, moments, num_examples=3 + value)
    running.wait(job.job_id, "completed", "failed")
    trained = Trained(made=running, job_id=job.job_id)
    aggregated = next(model for model in trained.models("moments") if model.site is None)
    verdicts = trained.verify(aggregated.model_id, whole_chain=True)
    assert [(each.result, each.updates) for each in verdicts] == [
        (Result.SAME, 2),
        (Result.SAME, 2),
        (Result.INTACT, 0),
    ]


def test_of_an_s3_store_the_bucket_is_verified_not_the_cache(tmp_path: Path) -> None:
    with juicefs() as server:
        s3: dict[str, Any] = {
            "blob_store": "s3",
            "s3_endpoint": server.endpoint,
            "s3_access_key": server.access_key,
            "s3_secret_key": server.secret_key,
            "s3_secure": False,
            "s3_bucket": "verify",
            "cache_folder": str(tmp_path / "cache"),
        }
        with federation(tmp_path, *NAMES, **s3) as made:
            assert isinstance(made.services.settings.s3_secret_key, SecretStr)
            with made.coordinator():
                trained = do_job(made)
            assert trained.verify()[0].result is Result.SAME
            blob = trained.an_update(trained.models("global")[0]).shards[0]
            other = tmp_path / "other"
            other.write_bytes(b"x" * blob.size)
            server.client().fput_object("verify", f"blobs/{blob.digest}", str(other))
            (verdict,) = trained.verify()
            assert verdict.result is Result.DIFFERENT
            assert f"{blob.digest} is damaged in the store" in verdict.troubles[0]
            assert list(made.services.blobs.scratch().iterdir()) == []


def test_a_copy_of_a_model_that_another_node_made_is_verified_there(trained: Trained) -> None:
    (model, *_) = trained.models("global")
    copy = replace(model, model_id=new_model_id(), parents=(), model_state=ModelState.TRANSFERRED)
    put = replace(copy, model_id=new_model_id(), model_meta={}, model_state=ModelState.AGGREGATED)
    with writing(trained.made.services.engine) as connection:
        for each in (copy, put):
            add_model(connection, each)
    (verdict,) = trained.verify(copy.model_id)
    assert verdict.result is Result.MISSING
    assert "verify it where it was made" in verdict.troubles[0]
    (verdict,) = trained.verify(put.model_id)
    assert verdict.result is Result.INTACT
    assert "no record says that it was aggregated" in verdict.sentence
