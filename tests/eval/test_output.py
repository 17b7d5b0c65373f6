"""What an evaluation leaves in its folder: old or new after a kill, checked when it is read, and no file of others."""

import json

import pytest
import torch

import memlayers as ml
from memlayers.eval.output import check_output, read_report, read_samples, write_output
from memlayers.eval.run import evaluate_model
from memlayers.files import DamagedFile
from tests.killing import kill_at_random_moments, run_child

ROWS = [{"question": f"q{i}", "correct": i % 2 == 0} for i in range(500)]


def draw(path):
    path.write_bytes(b"picture" * 5_000)


def put(folder, version):
    report = {"config": {"version": version}}
    rows = [{**row, "version": version} for row in ROWS]
    write_output(folder, {"report.md": f"version {version}\n"}, {"recall.png": draw}, report, rows)


def version_of(folder) -> int:
    """The one version that all files are of."""
    report = read_report(folder / "report.json")
    versions = {row["version"] for row in read_samples(folder, report)} | {report["config"]["version"]}
    versions.add(int((folder / "report.md").read_text().split()[1]))
    assert len(versions) == 1
    return versions.pop()


def test_what_is_written_is_read(tmp_path):
    put(tmp_path / "out", 1)
    assert version_of(tmp_path / "out") == 1
    put(tmp_path / "out", 2)
    assert version_of(tmp_path / "out") == 2


def test_killed_at_any_moment_all_files_are_old_or_all_are_new(tmp_path):
    out, before = tmp_path / "out", [0]

    def prepare():
        if out.exists():
            before[0] = version_of(out)
        (out.mkdir() if not out.exists() else None)
        (out / "thesis.pdf").write_bytes(b"mine")

    def check():
        now = version_of(out)
        assert now in (before[0], before[0] + 1)
        assert (out / "thesis.pdf").read_bytes() == b"mine"
        return "new" if now > before[0] else "old"

    kill_at_random_moments(prepare, lambda: put(out, before[0] + 1), check)


def test_an_evaluation_that_is_killed_leaves_the_report_before_it_or_its_own(tiny_llama, tokenizer, tmp_path):
    ml.attach(tiny_llama, ml.MemoryTokensConfig(n_tokens=4, segment_length=40), name="stream")
    suites = {
        "passkey": {"task": {"type": "passkey"}, "lengths": [64], "depths": [0.0], "n": 2, "regimes": ["W"]}
    }
    out, threads = tmp_path / "out", torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process with threads has none of them

    def run(seed):
        fields = {"seed": seed, "arms": ["trained"], "controls": []}
        evaluate_model(tiny_llama, tokenizer, suites, output_dir=out, **fields)

    expected = {}
    for seed in (1, 2):
        assert run_child(lambda seed=seed: run(seed)) == 0
        expected[seed] = (out / "samples.jsonl").read_bytes()
    assert expected[1] != expected[2]

    def check():
        report = read_report(out / "report.json")
        read_samples(out, report)
        seed = report["config"]["seed"]
        assert (out / "samples.jsonl").read_bytes() == expected[seed]
        assert (out / "report.md").read_text().count(f"Seed {seed}.") == 1
        return {1: "old", 2: "new"}[seed]

    try:
        kill_at_random_moments(lambda: run_child(lambda: run(1)), lambda: run(2), check)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["report.json", "samples.jsonl", "report.md", "recall.png"])
def test_a_file_of_others_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is not ours"):
        put(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_it_is_told_before_anything_is_measured(tiny_llama, tokenizer, tmp_path):
    (tmp_path / "report.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"report\.json is not ours"):
        check_output(tmp_path)


def test_a_file_that_was_changed_by_hand_is_not_replaced(tmp_path):
    put(tmp_path, 1)
    (tmp_path / "report.md").write_text("with my remarks\n")
    with pytest.raises(FileExistsError, match=r"report\.md is not ours, or was changed"):
        put(tmp_path, 2)
    assert (tmp_path / "report.md").read_text() == "with my remarks\n"
    assert read_report(tmp_path / "report.json")["config"]["version"] == 1


def test_a_damaged_report_or_row_is_told(tmp_path):
    put(tmp_path, 1)
    report = read_report(tmp_path / "report.json")
    rows = tmp_path / "samples.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b"true", b"true ", 1))
    with pytest.raises(DamagedFile, match=r"samples\.jsonl: not as it was written"):
        read_samples(tmp_path, report)
    path = tmp_path / "report.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 3'))
    with pytest.raises(DamagedFile, match=r"report\.json: not as it was written"):
        read_report(path)


def test_a_report_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"config": {"seed": 1}}))
    (tmp_path / "samples.jsonl").write_text('{"a": "x\u2028y"}\n')
    report = read_report(tmp_path / "report.json")
    assert report == {"config": {"seed": 1}}
    assert read_samples(tmp_path, report) == [{"a": "x\u2028y"}]
