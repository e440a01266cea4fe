"""The fuzzers run, find what is put there to be found, and no more; earlier findings stay mended.

The campaign itself is `python -m tests.campaigns.fuzz`; here each target has a short one.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import reference
import torch
from campaigns import differential
from campaigns import fuzz as campaign
from fuzz import native, structure, targets

from ternarize.trits import rans

FOUND = sorted(path for path in targets.FINDINGS.glob("*/*") if path.parent.name in targets.TARGETS)
EXECUTIONS = {"header": 3000, "json": 1500, "file": 1000, "directory": 300, "record": 150}
EXECUTIONS |= {"gguf": 400, "steps": 500}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_short_run(name: str, tmp_path: Path) -> None:
    target, rng = targets.TARGETS[name], random.Random(name)
    folder, limits = targets.Folder(tmp_path), targets.Limits()
    seeds = target.seeds()
    for at in range(EXECUTIONS[name]):
        data = target.mutate(rng.choice(seeds), rng) if at >= len(seeds) else seeds[at]
        targets.run_one(target, data, folder, limits)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_earlier_findings(path: Path, tmp_path: Path) -> None:
    target, folder = targets.TARGETS[path.parent.name], targets.Folder(tmp_path)
    targets.run_one(target, path.read_bytes(), folder, targets.Limits())


def test_mutations_reach_behind_the_first_checks(tmp_path: Path) -> None:
    """Enough of the files that mutations make are valid, and enough are not."""
    rng, folder = random.Random(1), targets.Folder(tmp_path)
    seeds, valid = targets.TARGETS["file"].seeds(), 0
    for _ in range(300):
        folder.write({"x": structure.change_file(rng.choice(seeds), rng)})
        _, error = targets.outcome(lambda: reference.decode(folder.path / "x"), Exception)
        valid += error is None
    assert 10 <= valid <= 280


def test_campaign_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--count", "200", "--target", "header", "--work", str(tmp_path / "work")]
    assert campaign.main([*arguments, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["executions"] == 200 and found["findings"] == 0
    reached, lines = found["targets"]["header"]["lines"]["files.headers"]
    assert 50 < reached < lines


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """A reader that lets everything through is caught, and the input is kept."""
    program = """
import sys
from fuzz import targets, worker
targets.read_header = lambda path: targets.reference.read_header(path.open("rb"), 1 << 40)
options = ["--plain", "--count", "2000", "--place", sys.argv[2]]
sys.argv[1:] = ["header", "--corpus", sys.argv[1], *options]
worker.main()
"""
    corpus = tmp_path / "work" / "corpus"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(campaign.PATHS)}
    command = [sys.executable, "-c", program, str(corpus), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert len(list(corpus.parent.glob("crash-*"))) == 1


@pytest.mark.skipif(bool(campaign.without_clang()), reason=str(campaign.without_clang()))
def test_compiled_core(tmp_path: Path) -> None:
    """The portable variant under sanitizers: earlier findings, and a few inputs more."""
    program = native.build(tmp_path, ("codec",), variants=False)["codec"]
    for path in sorted((targets.FINDINGS / "codec").iterdir()):
        subprocess.run([program, str(path)], check=True, capture_output=True)
    row = campaign.fuzz_native(program, 2000, 1, tmp_path / "codec")
    assert row["executions"] == 2000 and row["findings"] == [], row


@pytest.mark.slow
@pytest.mark.skipif(bool(campaign.without_clang()), reason=str(campaign.without_clang()))
def test_compiled_core_on_streams_and_stored_tensors(tmp_path: Path) -> None:
    """All variants: the portable one has no SHA-256, without which the core reads no files."""
    for name, program in native.build(tmp_path, ("rans", "stored")).items():
        row = campaign.fuzz_native(program, 5000, 1, tmp_path / name)
        assert row["executions"] == 5000 and row["findings"] == [], row


def test_decoders_agree() -> None:
    report = differential.campaign(150, most=3)
    assert report["tensors"] == 150
    assert min(report["compared"][name] for name in ("reference", "q2_0", "tq1_0")) > 5
    assert report["compared"]["streams whole"] > 200 > report["compared"].get("streams flipped", 0)
    assert report["bytes"] == {"accepted": 120, "refused": 3976}


@pytest.mark.parametrize(("values", "may"), [((7,), True), ((7, 8), False)])
def test_a_flip_that_nobody_notices_is_a_difference(
    values: tuple[int, ...], may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But of the height of chunks of which nothing has to be read."""
    rows = torch.tensor(values * 6, dtype=torch.uint8).reshape(6, -1).repeat_interleave(2, 0)
    classes, done = torch.zeros(rows.shape[1], dtype=torch.uint8), Counter[str]()
    monkeypatch.setattr(rans, "decode_rows", lambda *_: rows)
    monkeypatch.setattr(reference, "read_stream", lambda *_: rows.numpy().tobytes())
    raised = 0
    for number in range(150):
        try:
            differential.check_stream(number, rows, classes, done)
        except differential.Difference as error:
            assert "nobody notices" in str(error)
            raised += 1
    assert raised > 100 and (done["streams unnoticed"] > 0) == may
