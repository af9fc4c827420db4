"""Bad input gets one clear line that names what, where and what to do, exit code 2, and nothing is
written.

Before minutes are spent: a mistake in the last line of the held-out file is said before the first
sample.
"""

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import torch
from conftest import edit, spoil, table
from launch import ROOT
from pytest import fixture, mark, raises
from safetensors.torch import load_file, save_file

import eval
import train
from common.flags import help_of
from run.config import Config, parse

pytestmark = mark.slow

BASE = """--model toy --data good.jsonl --quality 1 --group-size 2 --buffer-groups 2 --updates 1
--max-new-tokens 4 --lr 1e-3 --out run --device cpu"""
RECIPES = ROOT / "recipes"
GOOD = '{"problem": "1", "answer": "1", "pass_rate": 0.5}'
BESIDE = {  # what stands beside the model and the problems
    "good.jsonl": GOOD,
    "plain.jsonl": '{"problem": "1", "answer": "1"}',
    "half.jsonl": '{"problem": "\\ud800", "solution": "1"}',
    "taken/metrics.jsonl": "a year of work",
    "file": "",
    "cut.jinja": "{% for turn in messages %}",
    "broken.py": "def f(:",
    "raises.py": "import nowhere",
    "empty.py": "x = 1",
    "uneven.args": "--suffix 'one",
    "exits.py": "import sys\nsys.exit(0)",
}


@fixture
def folder(tmp_path, toy_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(toy_folder, tmp_path / "toy")
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere-at-all")
    for name, text in BESIDE.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def files(folder):
    paths = [p for p in folder.rglob("*") if "__pycache__" not in str(p)]
    return {p: p.lstat().st_mtime_ns for p in paths}


@fixture
def refused(folder, capsys):
    """refused(message, words): train.main of the command line says one line that holds the message,
    exits with 2, and writes nothing. -> the line"""

    def refuse(message, words):
        before = files(folder)
        capsys.readouterr()
        with raises(SystemExit) as stop:
            train.main(words)
        printed = capsys.readouterr().err
        said = [line for line in printed.strip().splitlines() if not line.startswith("usage:")]
        assert stop.value.code == 2 and len(said) == 1, printed
        assert ": error: " in said[0] and message in said[0]
        assert files(folder) == before
        return said[0]

    return refuse


# ---------------------------------------------------------------------------------------- problems

# What stands in the file: \n is a new line, and GOOD a good problem.
FILES = r"""
GOOD\n{ | x.jsonl, line 2: Expecting property name
GOOD\n{"problem": "1 + 1", "ans | x.jsonl, line 2: Unterminated string
GOOD\n[1, 2] | x.jsonl, line 2: expected a JSON object, found list
3 | x.jsonl, line 1: expected a JSON object, found int
  | x.jsonl: nothing in it
\n \n | x.jsonl: nothing in it
problem,answer\n1,1 | x.jsonl, line 1: Expecting value
[\nGOOD\n] | x.jsonl: a JSON array
GOOD\n{"problem": "1"} | x.jsonl, line 2: no problem and answer in columns
{"text": "1", "answer": "1"} | x.jsonl, line 1: no problem and answer in columns that are known
{"prompt": [{"role": "system"}], "reward_model": {"ground_truth": "1"}} | "problem" must be a text
{"problem": "1", "answer": "so #### 1"} | x.jsonl: 1 of 1 gold answers cannot be graded ('x-1':
{"problem": " ", "answer": "1"} | x.jsonl, line 1: "problem" must be a text that is not blank
{"problem": ["1"], "answer": "1"} | "problem" must be a text
{"problem": "1", "answer": null} | x.jsonl: 1 of 1 gold answers cannot be graded ('x-1': '')
{"question": "1", "answer": " "} | x.jsonl: 1 of 1 gold answers cannot be graded
{"problem": "1", "solution": null} | x.jsonl: 1 of 1 gold answers cannot be graded
{"prompt": "1", "reward_model": {"ground_truth": null}} | x.jsonl: 1 of 1 gold answers cannot be
{"problem": "1", "answer": "proof"} | x.jsonl: 1 of 1 gold answers cannot be graded
[{"problem": "1", "answer": "1"}] | x.jsonl: a JSON array; one object a line is read
{"problem": "1", "answer": true} | "answer" must be a text or a number
{"problem": "1", "answer": ["1"]} | "answer" must be a text or a number
{"question": "1", "final_answer": [2]} | x.jsonl, line 1: "answer" must be a text or a number
{"problem": "1", "answer": NaN} | "answer" must be a text or a number
{"problem": "1", "answer": 1e999} | x.jsonl, line 1: "answer" must be a text or a number
{"problem": "1", "answer": "1", "pass_rate": 50} | x.jsonl, line 1: "pass_rate" must be a number
{"problem": "1", "answer": "1", "pass_rate": "0.5"} | "pass_rate" must be a number in [0, 1]
{"problem": "1", "answer": "1", "pass_rate": NaN} | x.jsonl, line 1: "pass_rate"
{"problem": "1", "answer": "1", "level": true} | x.jsonl, line 1: "level" must be a number
{"problem": "\ud800", "answer": "1"} | a lone surrogate
{"problem": "1", "answer": "1", "id": "\ud800"} | a lone surrogate
{"problem": "1", "answer": "1", "source": ["\udfff"]} | a lone surrogate
{"problem": "1", "answer": "1", "id": "a"}\n{"problem": "2", "answer": "2", "id": "a"} | twice
"""


@mark.parametrize("content, message", table(FILES))
def test_bad_problems(folder, refused, content, message):
    text = content.replace("GOOD", GOOD).replace(r"\n", "\n")
    (folder / "x.jsonl").write_text(text)
    for flag in ("--data", "--eval-data"):
        refused(message, [*BASE.split(), flag, "x.jsonl"])


ENCODED = [
    (b'{"problem": "gr\xf6\xdfer"}', "x.jsonl: cannot be read as UTF-8 text"),
    (GOOD.encode("utf-16"), "x.jsonl: cannot be read as UTF-8 text"),
    (pickle.dumps(GOOD), "x.jsonl: cannot be read as UTF-8 text"),
    (b'{"a":' + b"[" * 10_000, "x.jsonl, line 1"),
    (GOOD.replace("0.5", '0.5, "level": %s' % ("9" * 400)).encode(), '"level" must be a number'),
    (b'{"problem": "1", "answer": "1", "pass_rate": 0.5, "measured": 1}', '"measured" is not'),
    (
        b'{"problem": "1", "answer": "1", "pass_rate": 1.0}',
        "has no problem: choose another --quality",
    ),
    (b'{"problem": "%s", "answer": 1, "pass_rate": 0}' % (b"1" * 300), "'prompt too long': 1"),
]


@mark.parametrize("content, message", ENCODED, ids=range(len(ENCODED)))
def test_bad_files(folder, refused, content, message):
    (folder / "x.jsonl").write_bytes(content)
    refused(message, [*BASE.split(), "--data", "x.jsonl"])


# ------------------------------------------------------------------------------------------- flags

FLAGS = """
--data none.jsonl | none.jsonl: cannot be read as UTF-8 text
--data taken | taken: cannot be read as UTF-8 text
--eval-data none.jsonl | none.jsonl: cannot be read
--data good.jsonl[:10%] | good.jsonl[:10%]: a slice is written [:512] or [100:200]
--data good.jsonl[1:] | good.jsonl[1:]: nothing in it
--data none.jsonl[:5] | none.jsonl: cannot be read as UTF-8 text
--eval-data good.jsonl[5:2] | good.jsonl[5:2]: nothing in it
--columns problem=a answer=b | good.jsonl, line 1: no column a (has: problem, answer, pass_rate)
--difficulty level --quality 1 | --difficulty level: no problem of good.jsonl has a level
--template none.jinja | --template none.jinja: cannot be read as a chat template
--template taken | --template taken: cannot be read as a chat template
--template file | the chat template makes an empty prompt
--template cut.jinja | the chat template (or --template) fails (TemplateSyntaxError
--examples none.jsonl | none.jsonl: cannot be read
--examples good.jsonl | good.jsonl, line 1: a worked example needs the texts "problem" and
--examples half.jsonl | half.jsonl, line 1: half a character
--quality 0.2 1.0 | level 1 (Q = 0.2) has no problem
--updates 1 2 3 --quality 0.5 1 | 3 levels, and --quality needs 1 or 3 values, not 2
--quality 0.5 80 | must be in (0, 1]: a difficulty is 1 - pass rate, found 80
--quality nan | --quality must be a finite number
--difficulty level --quality nan | --quality must be a finite number
--data plain.jsonl --quality 0.5 | no problem of plain.jsonl has a pass_rate
--eps-low 1.0 | --eps-low must be in [0, 1), found 1.0
--eps-low -0.1 | --eps-low must be in [0, 1)
--eps-high -0.1 | --eps-high must be at least 0
--tokens -1 | --tokens must be at least 0
--tokens 5 5 5 --quality 0.5 1 | 3 levels, and --quality needs 1 or 3 values, not 2
--eval-quality 80 | --eval-quality must be in (0, 1]
--eval-data plain.jsonl --eval-quality 0.5 | no problem of plain.jsonl has a pass_rate
--eval-data plain.jsonl taken/plain.jsonl | --eval-data: results are known by the names of files
--eval-samples 0 | --eval-samples must be at least 1
--reward-timeout 0 | --reward-timeout must be above 0, found 0.0
--length-weight -1 | --length-weight must be at least 0
--group-size 1 | --group-size must be at least 2
--minibatches 3 | --buffer-groups must be at least --minibatches (3)
--temperature 0 | --temperature must be above 0, found 0.0
--temperature inf | --temperature must be above 0
--lr nan | --lr must be above 0, found nan
--lr -1 | --lr must be above 0, found -1.0
--max-new-tokens 0 | --max-new-tokens must be at least 1
--slots 7 | --slots must be at least 8, found 7
--keep-checkpoints 0 | --keep-checkpoints must be at least 1
--save-every -1 | --save-every must be at least 0
--seed -1 | --seed must be at least 0
--lora-rank -1 | --lora-rank must be at least 0
--lora-rank 1000000000000 | --lora-rank 1000000000000 is more than the hidden size
--reward none.py:f | importing none.py failed (FileNotFoundError
--reward maths | reward 'maths': expected math, or path.py:function
--reward broken.py:f | importing broken.py failed (SyntaxError
--reward raises.py:f | importing raises.py failed (ModuleNotFoundError
--reward empty.py:x | empty.py has no function x
--reward exits.py:f | importing exits.py failed (SystemExit
--columns answer=a | --columns answer=a: expected problem=NAME answer=NAME
--columns problem=a answer=b more=c | expected problem=NAME answer=NAME
--columns c | expected problem=NAME answer=NAME
--columns problem=a answer | expected problem=NAME answer=NAME
--columns problem=a answer= | expected problem=NAME answer=NAME
--data owner/name:train | owner/name:train: cannot be read
--model toy --template-kwargs [1 | --template-kwargs [1: not a JSON object
--model toy --stop 'two tokens' | --stop 'two tokens': is 10 tokens of this tokenizer, not one
@none.args | No such file or directory: 'none.args'
@uneven.args | No closing quotation
--reward good.jsonl:f | reward 'good.jsonl:f': expected math, or path.py:function
--out dangling | --out dangling: exists already
--out taken | --out taken: exists already; name a new folder, or go on with --resume
--out file | --out file: exists already
--out file/run | file
--device cuda | --device cuda: torch sees no GPU; use --device cpu
--model no/such/model/at-all | neither a folder nor to be had from the hub
--model nothing | neither a folder nor to be had from the hub
--model taken | taken: no config.json, so this is not a Hugging Face checkpoint folder
--model file | neither a folder nor
--top-p 0.9 | --top-p
--updat 3 | --updat
--updates many | argument --updates: invalid int value: 'many'
--updates 1.5 | argument --updates: invalid int value: '1.5'
--loss-norm mean | invalid choice: 'mean'
--dtype float16 | invalid choice: 'float16'
--fsdp | --fsdp needs torchrun
"""


@mark.parametrize("words, message", table(FLAGS))
def test_bad_flags(refused, words, message):
    refused(message, [*BASE.split(), *shlex.split(words)])


@mark.parametrize(
    "words, named",
    [
        ("", "--lr, --max-new-tokens, --updates or --tokens"),
        ("--lr 1e-6 --tokens 9", "--max-new-tokens"),
        ("--max-new-tokens 9 --updates 1", "--lr"),
        ("--max-new-tokens 9 --lr 1", "--updates or --tokens"),
        (f"@{RECIPES}/paper.args", "--lr, --max-new-tokens, --updates or --tokens"),
    ],
)
def test_defaults_of_the_shipped_model_are_no_defaults_of_others(refused, words, named):
    """3e-4 would ruin a model of 1.5 B without a word."""
    words = ["--model", "toy", *words.split()]
    message = refused(f"{named}: our defaults fit the shipped model alone", words)
    assert "@recipes/gsm8k-one-card.args" in message


def test_declared_levels_need_their_highest_numbers(refused):
    words = BASE.replace("--quality 1", "--difficulty level").split()
    refused("--difficulty level needs --quality", words)


def test_help_shows_every_flag_once_in_groups(capsys):
    with raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flags = [f"--{name.replace('_', '-')}" for name in ("resume", *vars(Config()))]
    assert sorted(re.findall(r"^  (--[\w-]+)", text, re.M)) == sorted(flags)
    found = re.findall(r"^(\w+)[^\n]*:\n", text, re.M)
    for flags, silent in ((Config, "fsdp"), (eval.Flags, "compare")):
        shown = {f.name: help_of(f) for f in fields(flags)}
        assert {n for n in shown if "default" not in shown[n]} == {"columns", "stop", silent}
    assert "default: None" not in text and "(default: [])" not in text
    assert " ".join(found) == "options levels objective optimizer sampling prompts machine files or"


def test_of_a_flag_that_stands_twice_the_last_wins():
    """As in any shell script."""
    cfg, _ = parse([*BASE.split(), "--updates=3", "--updates=2"])
    assert cfg.updates == [2]


@mark.parametrize("name", ["paper", "deepscaler", "fastcurl", "dapo", "dr-grpo"])
def test_flags_behind_a_recipe_win(name, monkeypatch):
    """A recipe that wins over the command line would train with another rate than was asked for.
    The words are those of a real command line."""
    words = f"@{RECIPES}/{name}.args --model toy --lr 1e-5 --max-new-tokens 9 --updates 7"
    monkeypatch.setattr("sys.argv", ["train.py", *words.split()])
    cfg, _ = parse(None)
    assert (cfg.lr, cfg.max_new_tokens, cfg.updates) == (1e-5, [9], [7])
    assert cfg.adv_std == ("none" if name == "dr-grpo" else "group")
    assert cfg.loss_norm == {"paper": "sequence", "dr-grpo": "constant"}.get(name, "token")


# ------------------------------------------------------------------------------------- checkpoints


NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
TENSORS = {
    f"the checkpoint lacks 1 tensor(s): {NORM} (32,)": {NORM: None},
    "has surplus 1 tensor(s): extra (3,)": {"extra": torch.ones(3)},
    f"has surplus 1 tensor(s): {NORM} (31,)": {NORM: torch.ones(31)},
    f"nan or infinity in 1 tensor(s), as torch.float32: {NORM}": {NORM: torch.ones(32) / 0},
    f"{NORM} is torch.int8, and only floats": {NORM: torch.ones(32, dtype=torch.int8)},
    "holds nan or infinity": {NORM: torch.full((32,), 1e300, dtype=torch.float64)},
}


@mark.parametrize("message", TENSORS)
def test_bad_tensors(folder, refused, message):
    path = folder / "toy/model.safetensors"
    tensors = {**load_file(path), **TENSORS[message]}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    refused(message, BASE.split())


# FILE {changes}, FILE = all that it holds, or FILE alone, which is deleted.
EDITS = """
config.json {"rope_parameters": {"rope_theta": 0}} | rope_theta 0 of the rotary
config.json {"rope_parameters": {"rope_theta": "big"}} | config.json
config.json {"rope_parameters": {"rope_type": "linear", "rope_theta": 9, "factor": 0}} | factor 0
config.json {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9, "factor": 2}} | 'dynamic'
config.json {"model_type": "gpt2"} | 'gpt2' is not supported (llama, qwen2, qwen3 are)
config.json {"model_type": "nonsense"} | config.json
config.json {"hidden_size": "wide"} | config.json
config.json {"num_attention_heads": 0} | config.json
config.json {"num_key_value_heads": 3} | 2 is no multiple of num_key_value_heads 3
config.json {"hidden_act": "gelu"} | hidden_act 'gelu' is not supported
config.json {"vocab_size": 10} | embed_tokens.weight
config.json = { | config.json
config.json = {"model_type": "llama", "num_hidden_layers": 1} | tensor(s)
config.json | no config.json
model.safetensors | model.safetensors is missing (weights are read from safetensors only)
model.safetensors = | not a readable safetensors file
model.safetensors = torn | not a readable safetensors file
generation_config.json {"eos_token_id": [99999]} | stop token 99999 is not in the model's vocabulary
generation_config.json {"eos_token_id": "</s>"} | stop token '</s>'
generation_config.json = { | generation_config.json: not a JSON object
tokenizer.json = { | its tokenizer cannot be loaded
tokenizer.json | tokenizer
tokenizer_config.json {"model_max_length": "x"} | its tokenizer
chat_template.jinja = {% for %} | the chat template (or --template) fails (TemplateSyntaxError
chat_template.jinja = {{ 1 / 0 }} | the chat template (or --template) fails (ZeroDivisionError
chat_template.jinja = {{ raise_exception('no system turns') }} | no system turns
chat_template.jinja = {# #} | chat template makes an empty prompt
"""


@mark.parametrize("change, message", table(EDITS))
def test_bad_checkpoints(folder, refused, change, message):
    name, _, change = change.partition(" ")
    spoil(folder / "toy" / name, change)
    refused(message, BASE.split())


def test_a_tokenizer_with_more_tokens_than_the_model(folder, refused):
    path = folder / "toy/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, EMBEDDING: tensors[EMBEDDING][:10].clone()}, path)
    edit(folder / "toy/config.json", {"vocab_size": 10})
    refused("not in the model's vocabulary of 10", BASE.split())


class Trap:
    def __reduce__(self):
        return exec, ("open('sprung', 'w')",)


@mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_no_pickle_is_opened(folder, refused, name):
    (folder / "toy/model.safetensors").unlink()
    torch.save({"weights": Trap()}, folder / "toy" / name)
    refused("safetensors", BASE.split())
    assert not (folder / "sprung").exists()


# ---------------------------------------------------------------------------------- run directories


@fixture
def begun(folder):
    """A run that has ended."""
    train.main(BASE.split())
    return folder / "run/config.json"


@mark.parametrize("run", ["taken", "nowhere", "''", "toy"])
def test_a_folder_that_is_no_run(refused, run):
    """Of a folder that is not there it said that another version of EPRLI had begun it."""
    (name,) = shlex.split(run)
    version = "the run was started by another version of EPRLI; resume it with that version"
    message = version if name == "toy" else "not a run directory (no config.json)"
    refused(f"--resume {name}: {message}", ["--resume", name])


def test_bad_run_directories(begun, refused):
    good = json.loads(begun.read_text())
    without_seed = {name: value for name, value in good.items() if name != "seed"}
    configs = {
        "another version of EPRLI; resume it with that version (config.json: KeyError: 'seed')": (
            without_seed
        ),
        "(config.json: KeyError: 'read')": {n: v for n, v in good.items() if n != "read"},
        "(config.json: ValueError: not all": good | {"read": None},
        "(config.json: TypeError: object of type 'NoneType'": good | {"slots": None},
        "(config.json: TypeError: 'NoneType'": good | {"tokens": None},
        "--lr must be above 0": good | {"lr": -1},
        "(config.json: TypeError": [],
    }
    for message, config in configs.items():
        begun.write_text(json.dumps(config))
        refused(message, ["--resume", "run"])


def test_what_a_run_directory_is_never_used_for(begun, refused):
    """Another run does not write to it, and a resumed run has the flags that it began with."""
    refused("--out run: exists already", BASE.split())
    for words in ("--lr 0.1", "--out other", "--reward-timeout 9"):
        message = f"the flags of run, and {words.split()[0]} is not one that may differ"
        refused(message, ["--resume", "run", *words.split()])


# ---------------------------------------------------------------------------------------- machines

ON_WINDOWS = """
import importlib, sys
import scipy.stats, torch, tqdm, transformers
from transformers import AutoTokenizer, GenerationConfig
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("eval", "rewards", "train"):
    try:
        importlib.import_module(name)
    except SystemExit as stop:
        print(name, stop)
"""


def test_windows_is_told_so_in_one_line():
    """Before fcntl and resource are imported, which it lacks."""
    words = [sys.executable, "-c", ON_WINDOWS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [f"{name} EPRLI needs Linux" for name in ("eval", "rewards", "train")]
    said = done.stdout.splitlines()
    assert len(said) == 3 and all(map(str.startswith, said, lines)), done.stderr
