"""Every bad input gets one clear line that names what, where and what to do, exit code 2, and nothing is written.

Before minutes are spent: a mistake in the last line of the held-out file is said before the first sample.
"""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train

pytestmark = pytest.mark.faults

GOOD = {"problem": "1", "answer": "1", "pass_rate": 0.5}


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


FILES = {  # the content of --data, and what is said of it
    "no JSON": (lines(GOOD, "{"), "x.jsonl, line 2: Expecting property name"),
    "a torn last line": (
        lines(GOOD, '{"problem": "1 + 1", "ans'),
        "x.jsonl, line 2: Unterminated string",
    ),
    "a list": (lines(GOOD, [1, 2]), "x.jsonl, line 2: expected a JSON object, found list"),
    "a number": ("3", "x.jsonl, line 1: expected a JSON object, found int"),
    "nothing": ("", "x.jsonl: nothing in it"),
    "blank lines": ("\n \n", "x.jsonl: nothing in it"),
    "a CSV": ("problem,answer\n1,1", "x.jsonl, line 1: Expecting value"),
    "one JSON array over many lines": ("[\n" + json.dumps(GOOD) + "\n]", "x.jsonl, line 1"),
    "no answer": (lines(GOOD, {"problem": "1"}), 'x.jsonl, line 2: no "answer" (has: problem)'),
    "no problem": (
        lines({"question": "1", "answer": "1"}),
        'x.jsonl, line 1: no "problem" (has: question, answer)',
    ),
    "a blank problem": (
        lines({**GOOD, "problem": " "}),
        '"problem" must be a text that is not blank',
    ),
    "a problem that is a list": (lines({**GOOD, "problem": ["1"]}), '"problem" must be a text'),
    "an answer that is null": (
        lines({**GOOD, "answer": None}),
        '"answer" must be a text or a number',
    ),
    "an answer that is true": (
        lines({**GOOD, "answer": True}),
        '"answer" must be a text or a number',
    ),
    "an answer that is a list": (
        lines({**GOOD, "answer": ["1"]}),
        '"answer" must be a text or a number',
    ),
    "a pass rate above 1": (
        lines({**GOOD, "pass_rate": 50}),
        '"pass_rate" must be a number in [0, 1]',
    ),
    "a pass rate that is a text": (
        lines({**GOOD, "pass_rate": "0.5"}),
        '"pass_rate" must be a number in [0, 1]',
    ),
    "a pass rate that is nan": (
        '{"problem": "1", "answer": "1", "pass_rate": NaN}',
        '"pass_rate" must be a number in [0, 1]',
    ),
    "a level that is a text": (lines({**GOOD, "level": "hard"}), '"level" must be a number'),
    "half a character": (lines({**GOOD, "problem": "\ud800"}), "a lone surrogate"),
    "half a character in an id": (lines({**GOOD, "id": "\ud800"}), "a lone surrogate"),
    "half a character in another field": (
        lines({**GOOD, "source": ["\udfff"]}),
        "a lone surrogate",
    ),
    "an answer that is nan": (
        '{"problem": "1", "answer": NaN}',
        '"answer" must be a text or a number',
    ),
    "an answer beyond all numbers": (
        '{"problem": "1", "answer": 1e999}',
        '"answer" must be a text or a number',
    ),
    "ten thousand brackets": ("[" * 10_000, "x.jsonl, line 1"),
    "an id that stands twice": (
        lines({**GOOD, "id": "a"}, {**GOOD, "id": "a", "problem": "2"}),
        "the id 'a' stands twice",
    ),
    "Latin-1": (
        lines({**GOOD, "problem": "größer"})
        .encode("utf-8")
        .decode("unicode_escape")
        .encode("latin-1", "ignore")
        + b"\xe9",
        "x.jsonl: not UTF-8 text",
    ),
    "UTF-16": (lines(GOOD).encode("utf-16"), "x.jsonl: not UTF-8 text"),
    "a pickle": (pickle.dumps(GOOD), "x.jsonl: not UTF-8 text"),
    "no problem with a pass rate that is cut": (
        lines({**GOOD, "pass_rate": 1.0}),
        "has no problem: choose another --quality",
    ),
    "prompts beyond the context": (
        lines({**GOOD, "problem": "1" * 300}),
        "every prompt is longer than the context of 128 tokens",
    ),
}


def refused(arguments, capsys, folder, *messages):
    """train.main(arguments) says one line that holds the messages, exits with 2, and leaves the folder as it is."""
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    said = [line for line in printed.err.strip().splitlines() if not line.startswith("usage:")]
    assert stop.value.code == 2 and len(said) == 1 and ": error: " in said[0], printed.err
    for message in messages:
        assert message in said[0]
    assert {
        p: p.lstat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in str(p)
    } == before


@pytest.fixture
def folder(tmp_path, toy_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(toy_folder, tmp_path / "toy")
    (tmp_path / "good.jsonl").write_text(lines(GOOD, {**GOOD, "problem": "2"}))
    (tmp_path / "plain.jsonl").write_text(lines({"problem": "1", "answer": "1"}))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("import nowhere")
    (tmp_path / "empty.py").write_text("x = 1")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)")
    (tmp_path / "moody.py").write_text(
        "def __getattr__(name):\n    raise RuntimeError(f'no {name} today')"
    )
    (tmp_path / "half.jsonl").write_text('{"problem": "\\ud800", "solution": "1"}')
    (tmp_path / "dangling").symlink_to("nowhere-at-all")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/metrics.jsonl").write_text("a year of work")
    (tmp_path / "file").write_text("")
    return tmp_path


BASE = {
    "model": "toy",
    "data": "good.jsonl",
    "quality": 1.0,
    "group_size": 2,
    "buffer_groups": 2,
    "updates": 1,
    "max_new_tokens": 4,
    "out": "run",
    "device": "cpu",
}


def words(**flags):
    result = []
    for name, value in {**BASE, **flags}.items():
        if value is not None:
            result += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
    return result


OF_TRAINING = (
    "no problem with a pass rate that is cut",
    "prompts beyond the context",
)  # held-out problems may be either


@pytest.mark.parametrize(
    "flag, name",
    [
        *(("data", name) for name in FILES),
        *(("eval_data", name) for name in FILES if name not in OF_TRAINING),
    ],
)
def test_bad_files(folder, capsys, name, flag):
    content, message = FILES[name]
    (folder / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(words(**{flag: "x.jsonl"}), capsys, folder, message)


FLAGS = [
    ({"data": "none.jsonl"}, "none.jsonl: cannot be read (No such file or directory)"),
    ({"data": "taken"}, "taken: cannot be read (Is a directory)"),
    ({"eval_data": "none.jsonl"}, "none.jsonl: cannot be read"),
    ({"examples": "none.jsonl"}, "none.jsonl: cannot be read"),
    (
        {"examples": "good.jsonl"},
        'good.jsonl, line 1: a worked example needs the texts "problem" and "solution"',
    ),
    ({"quality": (0.2, 1.0)}, "level 1 (Q = 0.2) has no problem"),
    (
        {"updates": (1, 2, 3), "quality": (0.5, 1.0)},
        "--updates has 3 values, so there are 3 levels, and --quality needs 1 or 3 values, not 2",
    ),
    (
        {"quality": (0.5, 80)},
        "--quality must be in (0, 1]: a difficulty is 1 - pass rate, found 80",
    ),
    ({"quality": "nan"}, "--quality must be in (0, 1]"),
    ({"eps_low": 1.0}, "--eps-low must be in [0, 1), found 1.0"),
    ({"eps_low": -0.1}, "--eps-low must be in [0, 1)"),
    ({"eps_high": -0.1}, "--eps-high must be at least 0"),
    ({"overlong_cache": 7}, "--overlong-cache 7 exceeds --max-new-tokens"),
    ({"overlong_cache": 0}, "--overlong-cache must be at least 1"),
    ({"group_size": 1}, "--group-size must be at least 2: a group of one has no advantage"),
    ({"minibatches": 3}, "--buffer-groups must be at least --minibatches (3)"),
    ({"temperature": 0}, "--temperature must be above 0, found 0.0"),
    ({"temperature": "inf"}, "--temperature must be above 0"),
    ({"lr": "nan"}, "--lr must be above 0, found nan"),
    ({"lr": -1}, "--lr must be above 0, found -1.0"),
    ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
    ({"slots": 0}, "--slots must be at least 1"),
    ({"micro_batch_tokens": 0}, "--micro-batch-tokens must be at least 1"),
    ({"logits_per_chunk": 0}, "--logits-per-chunk must be at least 1"),
    ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1"),
    ({"save_every": -1}, "--save-every must be at least 0"),
    ({"seed": -1}, "--seed must be at least 0"),
    ({"reward": "none.py:f"}, "there is no file none.py"),
    ({"reward": "maths"}, "reward 'maths': expected math, or path.py:function"),
    ({"reward": "broken.py:f"}, "importing broken.py failed (SyntaxError"),
    ({"reward": "raises.py:f"}, "importing raises.py failed (ModuleNotFoundError"),
    ({"reward": "empty.py:x"}, "empty.py has no function x"),
    ({"reward": "exits.py:f"}, "importing exits.py failed (SystemExit"),
    ({"reward": "moody.py:f"}, "importing moody.py failed (RuntimeError: no f today)"),
    ({"examples": "half.jsonl"}, "half.jsonl, line 1: half a character"),
    ({"out": "dangling"}, "--out dangling: exists already"),
    ({"out": ""}, "--out .: exists already"),
    ({"resume": ""}, "config.json is not that of a run"),
    ({"reward": "good.jsonl:f"}, "good.jsonl is not a Python file"),
    ({"device": "cuda"}, "--device cuda: torch sees no GPU; use --device cpu"),
    ({"model": "no/such/model/at-all"}, "neither a folder nor to be had from the hub"),
    ({"model": "nothing"}, "neither a folder nor to be had from the hub"),
    ({"model": "taken"}, "taken: no config.json, so this is not a Hugging Face checkpoint folder"),
    ({"model": "file"}, "neither a folder nor"),
    ({"difficulty": "level", "quality": None}, "--difficulty level needs --quality"),
    ({"data": "plain.jsonl", "quality": 0.5}, "no problem of plain.jsonl has a pass_rate"),
    (
        {"out": "taken"},
        "--out taken: exists already; name a new folder, or go on with --resume taken",
    ),
    ({"out": "file"}, "--out file: exists already"),
    ({"out": "file/run"}, "file"),
    ({"top_p": 0.9}, "unrecognized arguments: --top-p"),
    ({"updates": "many"}, "argument --updates: invalid int value: 'many'"),
    ({"updates": 1.5}, "argument --updates: invalid int value: '1.5'"),
    ({"loss_norm": "mean"}, "invalid choice: 'mean'"),
    ({"dtype": "float16"}, "invalid choice: 'float16'"),
    ({"fsdp": True}, "--fsdp needs the processes that torchrun starts"),
    ({"resume": "taken"}, "--resume taken: taken/config.json is not that of a run"),
    ({"resume": "nowhere"}, "--resume nowhere: nowhere/config.json is not that of a run"),
]


@pytest.mark.parametrize("flags, message", FLAGS, ids=[message for _, message in FLAGS])
def test_bad_flags(folder, capsys, flags, message):
    refused(words(**flags), capsys, folder, message)


def test_a_run_directory_is_never_written_to_by_another_run(folder, capsys):
    train.main(words())
    capsys.readouterr()
    refused(
        words(),
        capsys,
        folder,
        "--out run: exists already; name a new folder, or go on with --resume run",
    )


# ------------------------------------------------------------------------------------------------------ checkpoints


def tensors(change):
    def build(model):
        held = load_file(model / "model.safetensors")
        change(held)
        save_file(held, model / "model.safetensors")

    return build


def config(name="config.json", **changes):
    def build(model):
        path = model / name
        path.write_text(
            json.dumps({**json.loads(path.read_text() if path.exists() else "{}"), **changes})
        )

    return build


def text(name, content):
    return lambda model: (model / name).write_text(content)


def only_a_pickle(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def a_pickle_in_disguise(model):
    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(model / 'sprung')!r}, 'w')",)

    torch.save({"weights": Trap()}, model / "model.safetensors")


def without_template(model):
    (model / "chat_template.jinja").unlink()


NORM = "model.layers.0.input_layernorm.weight"
CHECKPOINTS = {
    "a tensor missing": (
        tensors(lambda t: t.pop(NORM)),
        f"toy: the checkpoint lacks 1 tensor(s): {NORM} (32,)",
    ),
    "a tensor too many": (
        tensors(lambda t: t.update(extra=torch.ones(3))),
        "toy: the checkpoint has surplus 1 tensor(s): extra (3,)",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t.update({NORM: torch.ones(31)})),
        f"misshapes 1 tensor(s): {NORM} (31,), wanted (32,)",
    ),
    "a tensor with nan": (
        tensors(lambda t: t[NORM].fill_(float("nan"))),
        f"holds nan or infinity in 1 tensor(s), as torch.float32: {NORM}",
    ),
    "a tensor that overflows": (
        tensors(lambda t: t.update({NORM: torch.full((32,), 1e300, dtype=torch.float64)})),
        "holds nan or infinity in 1 tensor(s), as torch.float32",
    ),
    "a tensor of whole numbers": (
        tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)})),
        f"holds something else than floats in 1 tensor(s): {NORM} torch.int64",
    ),
    "a tensor of truths": (
        tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.bool)})),
        "holds something else than floats",
    ),
    "a tensor of eight bits": (
        tensors(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        "holds something else than floats",
    ),
    "a norm's epsilon below 0": (config(rms_norm_eps=-1.0), "rms_norm_eps -1.0 must be above 0"),
    "a rotary base of 0": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "rope_theta 0 of the rotary embedding must be above 0",
    ),
    "a rotary base that is a text": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "big"}),
        "config.json",
    ),
    "a rotary factor of 0": (
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        "factor 0 of the rotary embedding",
    ),
    "no context": (config(max_position_embeddings=0), "max_position_embeddings 0 must be above 0"),
    "a tensor with infinity": (
        tensors(lambda t: t[NORM][3:4].fill_(float("inf"))),
        f"tensor(s), as torch.float32: {NORM}",
    ),
    "a torn weights file": (
        lambda m: (m / "model.safetensors").write_bytes(
            (m / "model.safetensors").read_bytes()[:5000]
        ),
        "not a readable safetensors file",
    ),
    "an empty weights file": (
        lambda m: (m / "model.safetensors").write_bytes(b""),
        "not a readable safetensors file",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        "toy: model.safetensors is missing",
    ),
    "a pickle alone": (
        only_a_pickle,
        "model.safetensors is missing (weights are read from safetensors only)",
    ),
    "a pickle named model.safetensors": (a_pickle_in_disguise, "not a readable safetensors file"),
    "an index of nothing": (
        lambda m: (
            (m / "model.safetensors").unlink(),
            (m / "model.safetensors.index.json").write_text("[]"),
        ),
        "not an index of safetensors shards",
    ),
    "an index of a missing shard": (
        lambda m: (
            (m / "model.safetensors").unlink(),
            (m / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
        ),
        "b.safetensors is missing",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "a config that is no JSON": (text("config.json", "{"), "config.json"),
    "another architecture": (
        config(model_type="gpt2"),
        "model type 'gpt2' is not supported (llama, qwen2, qwen3 are)",
    ),
    "an unknown architecture": (config(model_type="nonsense"), "config.json"),
    "a config without sizes": (text("config.json", '{"model_type": "llama"}'), "tensor(s)"),
    "a size that is a text": (config(hidden_size="wide"), "config.json"),
    "a size of zero": (config(num_attention_heads=0), "config.json"),
    "heads that do not fit": (
        config(num_key_value_heads=3),
        "num_attention_heads 2 is no multiple of num_key_value_heads 3",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "another rotary scaling": (
        config(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "'yarn' is not supported",
    ),
    "a tokenizer without a template": (without_template, "its tokenizer has no chat template"),
    "a template that is no template": (
        text("chat_template.jinja", "{% for %}"),
        "chat template fails (TemplateSyntaxError",
    ),
    "an index of numbers": (
        lambda m: (
            (m / "model.safetensors").unlink(),
            (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
        ),
        "1 is missing",
    ),
    "a template that divides by zero": (
        text("chat_template.jinja", "{{ 1 / 0 }}"),
        "chat template fails (ZeroDivisionError",
    ),
    "a template that raises": (
        text("chat_template.jinja", "{{ raise_exception('no system turns') }}"),
        "no system turns",
    ),
    "a template that says nothing": (
        text("chat_template.jinja", "{# #}"),
        "chat template makes an empty prompt",
    ),
    "no tokenizer": (
        lambda m: ((m / "tokenizer.json").unlink(), (m / "tokenizer_config.json").unlink()),
        "tokenizer",
    ),
    "a tokenizer that is no JSON": (text("tokenizer.json", "{"), "its tokenizer cannot be loaded"),
    "a stop token that the vocabulary lacks": (
        config("generation_config.json", eos_token_id=[99999]),
        "stop token 99999 is not in the model's vocabulary of",
    ),
    "a stop token that is a text": (
        config("generation_config.json", eos_token_id="</s>"),
        "stop token '</s>'",
    ),
    "a generation config that is no JSON": (
        text("generation_config.json", "{"),
        "generation_config.json: not a JSON object",
    ),
    "a tokenizer with more tokens than the model": (
        lambda m: (
            config(vocab_size=10)(m),
            tensors(
                lambda t: t.update(
                    {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:10].clone()}
                )
            )(m),
        ),
        "not in the model's vocabulary of 10",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(folder, capsys, name):
    build, message = CHECKPOINTS[name]
    build(folder / "toy")
    refused(words(), capsys, folder, message)
    assert not (folder / "toy/sprung").exists()  # no pickle was opened


RUNS = {  # what stands in config.json of the run to be resumed
    "no object": (lambda c: [], "is not that of a run"),
    "no number where one belongs": (
        lambda c: {**c, "lr": "x"},
        "argument --lr: invalid float value: 'x'",
    ),
    "one value where a list belongs": (
        lambda c: {**c, "updates": "three"},
        "argument --updates: invalid int value: 'three'",
    ),
    "an unknown dtype": (
        lambda c: {**c, "dtype": "nonsense"},
        "argument --dtype: invalid choice: 'nonsense'",
    ),
    "a flag missing": (
        lambda c: {k: v for k, v in c.items() if k != "seed"},
        "is not that of a run (KeyError: 'seed')",
    ),
    "its inputs missing": (
        lambda c: {k: v for k, v in c.items() if k != "inputs"},
        "is not that of a run (KeyError: 'inputs')",
    ),
    "a learning rate below 0": (lambda c: {**c, "lr": -1}, "--lr must be above 0"),
}


@pytest.mark.parametrize("name", RUNS)
def test_bad_run_directories(folder, capsys, name):
    change, message = RUNS[name]
    train.main(words(updates=1))
    path = folder / "run/config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    capsys.readouterr()
    refused(["--resume", "run"], capsys, folder, message)


@pytest.mark.parametrize("flag", [("--lr", "0.1"), ("--out", "other"), ("--explain",)])
def test_flags_that_a_resumed_run_does_not_take(folder, capsys, flag):
    train.main(words(updates=1))
    capsys.readouterr()
    refused(
        ["--resume", "run", *flag],
        capsys,
        folder,
        f"--resume goes on with the flags of run, and {flag[0]} is not one that may differ",
    )


def test_there_are_enough_of_them():
    assert len(FILES) + len(FLAGS) + len(CHECKPOINTS) >= 100
