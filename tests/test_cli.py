"""The command line: help texts, wrap and inspect on a tiny model, and errors of one paragraph."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import memlayers as ml
from memlayers.cli import app

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["wrap", "train", "eval", "report", "compare", "demo", "bench", "inspect"]


def run(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call, colours and box lines removed and white space flattened."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    flat = [
        re.sub(r"[│╭╮╰╯─┃━]", " ", re.sub(r"\x1b\[[0-9;]*m", "", s)) for s in (result.stdout, result.stderr)
    ]
    return result.exit_code, *(" ".join(text.split()) for text in flat)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random Llama in the Hugging Face format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("models") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def memories(tmp_path):
    """Writes a YAML file of memories and returns its path."""

    def write(text: str = "memories:\n  stream: {type: tokens, n_tokens: 4, segment_length: 16}\n"):
        path = tmp_path / "memories.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name):
    """Each command has a description of several sentences, and no option without a text."""
    code, out, err = run(name, "--help")
    assert code == 0 and err == ""
    assert f"memlayers {name}" in out.replace("Usage: root", "Usage: memlayers")
    import typer.main

    command = typer.main.get_command(app).commands[name]
    assert len((command.help or "").split()) >= 25
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} has no help"


def test_help_of_the_app_lists_the_commands():
    code, out, _ = run("--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out


def test_wrap_and_inspect(base, memories, tmp_path):
    out = tmp_path / "wrapped"
    code, said, err = run("wrap", base, "--config", memories(), "--out", out)
    assert code == 0, err
    assert "stream" in said and "tokens" in said
    model = ml.load(out)
    assert ml.memories(model)["stream"].config.n_tokens == 4
    assert not (out / "base").exists()
    assert json.loads((out / "memory_config.json").read_text())["base"]["name_or_path"] == str(base.resolve())

    code, said, err = run("inspect", out)
    assert code == 0, err
    n_memory = sum(p.numel() for _, p in ml.memory_parameters(model))
    state = ml.write(model, torch.zeros(1, 16, dtype=torch.int64))
    ours = sum(t.nbytes for t in state["stream"].values())
    assert f"{n_memory:,}" in said and f" {ours:,} " in said
    assert "attention reaches 16 tokens" in said and "segment_length: 16" in said


def test_inspect_tells_what_a_segment_adds(base, memories, tmp_path):
    text = "memories:\n  stream: {type: tokens, n_tokens: 4, segment_length: 16, mode: accumulate}\n"
    assert run("wrap", base, "-c", memories(text), "-o", tmp_path / "out")[0] == 0
    code, said, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert (
        f" 8 {4 * 32 * 4:,} " in said
    )  # an int64 length before reading; then 4 tokens of 32 float32 a segment


def test_wrap_overrides_and_save_base(base, memories, tmp_path):
    out = tmp_path / "wrapped"
    code, _, err = run("wrap", base, "-c", memories(), "-o", out, "memories.stream.n_tokens=6")
    assert code == 0, err
    assert ml.memories(ml.load(out))["stream"].config.n_tokens == 6


BAD_CONFIGS = {
    "memories:\n  stream: {type: tokens, n_token: 4}\n": [
        "memories.stream.n_token",
        "did you mean 'n_tokens'",
    ],
    "memories:\n  stream: {type: token}\n": ["memories.stream.type", "did you mean 'tokens'"],
    "memories:\n  stream: {type: tokens, n_tokens: four}\n": ["memories.stream.n_tokens", "integer"],
    "memorys:\n  stream: {type: tokens}\n": ["memorys", "did you mean 'memories'"],
    "memories: {}\n": ["memories", "names no memory"],
    "memories:\n  stream: {type: tokens, segment_length: 5000}\n": ["segment_length", "5000"],
    "memories: [\n": ["not valid YAML"],
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_wrap_names_the_wrong_field(base, memories, tmp_path, text):
    out = tmp_path / "wrapped"
    code, _, err = run("wrap", base, "-c", memories(text), "-o", out)
    assert code == 1
    assert "Traceback" not in err
    for part in BAD_CONFIGS[text]:
        assert part in err
    assert not out.exists()


def test_debug_raises_the_error(base, memories, tmp_path):
    text = "memories:\n  stream: {type: tokens, n_token: 4}\n"
    with pytest.raises(ml.ConfigError, match="n_token"):
        run("wrap", base, "-c", memories(text), "-o", tmp_path / "out", "--debug")


def test_wrap_refuses_a_model_without_decoder_stack(memories, tmp_path):
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    code, _, err = run("wrap", tmp_path / "t5", "-c", memories(), "-o", tmp_path / "out")
    assert code == 1 and "Traceback" not in err
    assert "causal language model" in err


def test_missing_things_are_named(base, memories, tmp_path):
    nowhere = tmp_path / "nowhere"
    for arguments in (
        ["wrap", nowhere, "-c", memories(), "-o", tmp_path / "out"],
        ["wrap", base, "-c", nowhere, "-o", tmp_path / "out"],
        ["inspect", nowhere],
        ["train", "--config", nowhere],
        ["eval", "--config", nowhere],
    ):
        code, _, err = run(*arguments)
        assert code == 1, arguments
        assert "nowhere" in err.replace(" ", "") and "Traceback" not in err


def test_wrap_onto_a_file(base, memories, tmp_path):
    (tmp_path / "taken").write_text("mine")
    code, _, err = run("wrap", base, "-c", memories(), "-o", tmp_path / "taken")
    assert code == 1 and "is a file" in err
    assert (tmp_path / "taken").read_text() == "mine"


def test_inspect_shows_which_slots_a_text_uses(tmp_path):
    base = Path(ml.__file__).parent / "demo" / "base"  # it has a tokenizer
    memories = tmp_path / "product_key.yaml"
    memories.write_text("memories: {facts: {type: product_key, n_keys: 8, top_k: 4, key_dim: 8}}")
    assert run("wrap", base, "--config", memories, "--out", tmp_path / "out")[0] == 0
    text, picture = tmp_path / "text.txt", tmp_path / "usage.png"
    text.write_text("The grass is green. " * 40)
    code, said, err = run("inspect", tmp_path / "out", "--text", text, "--picture", picture)
    assert code == 0, err
    for word in ("slots_used", "keys_dead", "effective_slots", "weighted_gini", "facts.layers.0"):
        assert word in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_counts_no_slots_where_there_are_none(base, memories, tmp_path):
    run("wrap", base, "--config", memories(), "--out", tmp_path / "out")
    (tmp_path / "text.txt").write_text("The grass is green.")
    code, _, err = run("inspect", tmp_path / "out", "--text", tmp_path / "text.txt")
    assert code == 1 and "has no memory of kind product_key" in err


def test_inspect_of_a_cut_file(base, memories, tmp_path):
    out = tmp_path / "out"
    assert run("wrap", base, "-c", memories(), "-o", out)[0] == 0
    weights = out / "memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    code, _, err = run("inspect", out)
    assert code == 1 and "memory.safetensors" in err and "Traceback" not in err


def test_misspelt_field_of_a_training_config(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("model: {pathh: x}\noutput_dir: y\n")
    code, _, err = run("train", "--config", config)
    assert (
        code == 1 and "error model.pathh:" in err and "did you mean 'path'" in err and "Traceback" not in err
    )


def test_misspelt_override_of_an_evaluation(tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(
        "experiment: recall\nmodel: x\nsuites:\n  passkey: {task: {type: passkey}, lengths: [32]}\n"
    )
    code, _, err = run("eval", "--config", config, "suites.passkey.lenghts=[64]")
    assert code == 1 and "error suites.passkey.lenghts:" in err and "did you mean 'lengths'" in err


@pytest.fixture
def short_training(tmp_path):
    """Overrides that make a training of the demo's config last three steps."""
    folder = tmp_path / "train"
    return folder, [
        "max_steps=3",
        "batch_size=4",
        "checkpoint_every=null",
        "trackers=[]",
        f"output_dir={folder}",
    ]


def test_train_then_eval(short_training, tmp_path, monkeypatch):
    """The committed demo configs, from the root of the repository, cut short."""
    monkeypatch.chdir(ROOT)
    folder, overrides = short_training
    code, _, err = run("train", "--config", "configs/train/demo_passkey.yaml", *overrides)
    assert code == 0, err
    assert (folder / "curve.png").is_file()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3

    again, _, err = run("train", "--config", "configs/train/demo_passkey.yaml", *overrides)
    assert again == 1 and "--resume" in err and "Traceback" not in err

    asked = [f"model={folder / 'final'}", "suites.passkey.windows=[1,2]", "suites.passkey.n=5"]
    code, said, err = run("eval", "-c", "configs/eval/demo.yaml", "--out", tmp_path / "report", *asked)
    assert code == 0, err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    cells = {
        c.get("arm"): c for t in report["tables"] for c in t["cells"] if c.get("length") == 64 and "n" in c
    }
    assert cells["trained"]["n"] == 5
    assert "passkey, memory_only" in said and "passkey, memory_only: controls" in said


@pytest.mark.slow
def test_train_in_two_processes(short_training):
    """--num-processes starts two, and the run itself checks that two came."""
    folder, overrides = short_training
    command = [sys.executable, "-c", "from memlayers.cli import app; app()"]
    command += ["train", "--config", "configs/train/demo_passkey.yaml", "--num-processes", "2", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (folder / "final" / "memory.safetensors").is_file()


def test_demo_leaves_report_and_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "demo"
    short = ["max_steps=2", "batch_size=4", "checkpoint_every=null", "trackers=[]"]
    code, said, err = run("demo", *short, "--out", out, "--items", 2)
    assert code == 0, err
    assert (out / "passkey.png").stat().st_size > 1000
    report = json.loads((out / "report.json").read_text())
    assert {32, 256} <= {cell.get("length") for table in report["tables"] for cell in table["cells"]}
    assert "memory_only" in said and str(out / "report.json").replace(" ", "") in said.replace(" ", "")
