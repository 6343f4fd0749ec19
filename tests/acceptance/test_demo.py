import csv
import json
import signal

import pytest
from safetensors.numpy import load_file

from tests.workplace import Workplace


@pytest.mark.timeout(240)
def test_a_small_demo_leaves_its_results_and_nothing_running(workplace: Workplace) -> None:
    printed = workplace.run("demo", "--sites", "3", "--rounds", "3", "--json", seconds=200).json
    output = workplace.folder / "demo-output"
    names = ["accuracy.png", "metrics.csv", "model.safetensors", "summary.json"]
    assert sorted(file.name for file in output.iterdir()) == names

    summary = json.loads((output / "summary.json").read_text())
    assert summary == printed
    assert (summary["sites"], summary["rounds"], summary["alpha"], summary["seed"]) == (3, 3, 0.5, 0)
    accuracies = ("federated_accuracy", "centralized_accuracy", "local_only_accuracy_mean")
    assert all(0 < summary[name] <= 1 for name in accuracies)
    assert 0 < summary["seconds_per_round_median"] < summary["seconds_federated"] < summary["seconds_total"]

    with (output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["kind"], row["site"]) for row in rows] == [
        (str(number), kind, site)
        for number in (1, 2, 3)
        for kind in ("train", "test")
        for site in ("all", "site-1", "site-2", "site-3")
    ]
    assert {row["state"] for row in rows} == {"closed", "accepted"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows if row["kind"] == "test")

    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert sum(tensor.size for tensor in load_file(output / "model.safetensors").values()) > 1000
    assert workplace.processes() == []
    assert list(workplace.temporary.iterdir()) == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_stops_everything(workplace: Workplace, number: signal.Signals, code: int) -> None:
    demo = workplace.start("demo", "--sites", "2", "--rounds", "1000")
    assert demo.stdout is not None
    lines = iter(demo.stdout.readline, "")
    assert any("train round 1 closed" in line for line in lines)
    assert len(workplace.processes()) > 4
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == code
    assert workplace.processes() == []
    assert list(workplace.temporary.iterdir()) == []
    assert list((workplace.folder / "demo-output").iterdir()) == []
