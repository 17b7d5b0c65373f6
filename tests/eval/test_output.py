"""What an evaluation leaves in its folder: old or new after a kill, checked when it is read, and no file of others."""

import json

import pytest
import torch

import memlayers as ml
from memlayers.eval.output import check_output, read_records, read_written, write_output
from memlayers.eval.runner import evaluate_model
from memlayers.files import DamagedFile
from tests.killing import kill_at_random_moments, run_child

HEAD = {"experiment": "recall", "config": {}, "config_hash": "", "seeds": {}}


def put(folder, version):
    rows = [HEAD, *({"question": f"q{i}", "correct": i % 2 == 0, "version": version} for i in range(500))]
    texts = {
        "records.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "report.md": f"version {version}\n",
    }
    write_output(folder, texts, {"recall.png": b"picture" * 5_000}, {"version": version})


def version_of(folder) -> int:
    """The one version that all files are of."""
    versions = {row["version"] for row in read_records(folder)[1]}
    versions |= {json.loads(read_written(folder / "report.json"))["version"]}
    versions |= {int(read_written(folder / "report.md").split()[1])}
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
    few = {"lengths": [64], "depths": [0.0], "n": 2, "conditions": ["sliding_window"]}
    suites = {"passkey": {"task": {"type": "passkey"}, **few}}
    out, threads = tmp_path / "out", torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process with threads has none of them

    def run(seed):
        fields = {"seeds": [seed], "arms": ["trained"], "controls": []}
        evaluate_model(tiny_llama, tokenizer, suites=suites, output_dir=out, **fields)

    expected = {}
    for seed in (1, 2):
        assert run_child(lambda seed=seed: run(seed)) == 0
        expected[seed] = read_records(out)[1]
    assert expected[1] != expected[2]

    def check():
        head, records = read_records(out)
        (seed,) = map(int, head["seeds"])
        assert records == expected[seed]
        assert (out / "report.md").read_text().count(f"seeds {seed}.") == 1
        return {1: "old", 2: "new"}[seed]

    try:
        kill_at_random_moments(lambda: run_child(lambda: run(1)), lambda: run(2), check)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["report.json", "records.jsonl", "report.md", "recall.png"])
def test_a_file_of_others_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is not ours"):
        put(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_it_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "report.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"report\.json is not ours"):
        check_output(tmp_path, ["report.json"])


def test_a_file_that_was_changed_by_hand_is_not_replaced(tmp_path):
    put(tmp_path, 1)
    (tmp_path / "report.md").write_text("with my remarks\n")
    with pytest.raises(FileExistsError, match=r"report\.md is not ours, or was changed"):
        put(tmp_path, 2)
    assert (tmp_path / "report.md").read_text() == "with my remarks\n"
    assert read_records(tmp_path)[1][0]["version"] == 1


def test_damaged_records_are_told(tmp_path):
    put(tmp_path, 1)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b"true", b"true ", 1))
    with pytest.raises(DamagedFile, match=r"records\.jsonl: not as it was written"):
        read_records(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "records.jsonl").write_text('{"experiment": "recall"}\n')
    with pytest.raises(DamagedFile, match=r"records\.jsonl: is no file of records"):
        read_records(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="measure with memlayers eval"):
        read_records(tmp_path / "nowhere")
