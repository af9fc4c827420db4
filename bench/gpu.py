"""What one GPU makes of this project, as one table. `bash bench/gpu.sh` runs it.

    python bench/gpu.py --model Qwen/Qwen2.5-1.5B-Instruct --out DIR     all rows, as a table
    python bench/gpu.py --row decoding ...                               one, as lines of JSON
    python bench/gpu.py --arithmetic                                     what cards should need

Every row is a process of its own with a time limit. One that fails or takes longer keeps what it
has printed, and its last line says why; the others go on. --out has a log for each row.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import common
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from files import squash
from model import Transformer
from policy.checkpoint import find_folder
from policy.packed import packed
from rollout import Slots, capture, stream_key
from run.fit import UNCHECKPOINTED, free_bytes

SMALL_RUN = """--model {out}/small --out {out}/{name} --device {device} --dtype float32 --quality 1
--filter all --length-weight 0 --group-size 4 --buffer-groups 4 --lr 1e-3 --warmup 0 --updates 3
--max-new-tokens 48 --save-every 1 --keep-checkpoints 3 --eval-every 0
--reward bench/common.py:reward"""
FULL = "-c 'import torch, train; torch.cuda.set_per_process_memory_fraction(0.01); train.main()'"

# ------------------------------------------------------------------------------------------- rows
# Each prints what it has measured.


def say(**found):
    print(json.dumps(found), flush=True)


def card(args):
    driver = None
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch sees no card; DEVICE=cpu SIZE=2m NEW=8 tries the script without one")
        asked = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
        driver = squash(subprocess.getoutput(asked))
    memory = free_bytes(torch.device(args.device))
    say(torch=torch.__version__, card_and_driver=driver, free_bytes=memory)
    say(free_disk_bytes=shutil.disk_usage(args.out).free)
    say(product_flops_per_second=common.product_speed(args), bytes_per_second=bandwidth(args))


def model(args):
    """The model of all rows but the last, in a folder, and a small one for these."""
    common.make_model("2m" if args.size == "2m" else "135m", f"{args.out}/small")
    folder = Path(args.out, "model")
    try:
        if not args.model:
            raise ValueError("no --model is given")
        folder.symlink_to(find_folder(args.model).resolve())
        say(model=args.model)
    except ValueError as error:
        named = re.search(r"(?<![\d.])[\d.]+[bm]\b", args.model.lower())
        size = named[0] if named and named[0] in common.SIZES else args.size
        common.make_model(size, folder, getattr(torch, args.dtype), args.device)
        say(random_weights_of_the_shape=size, because=squash(str(error)))


@torch.inference_mode()
def decoding(args):
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), args.device)
    for slots, length in product((64, 256), (args.new_tokens, 8 * args.new_tokens)):
        try:
            with packed(model, slots):
                decode(args, model, slots, length)
        except torch.OutOfMemoryError:
            say(slots=slots, positions=length, fits=False)


def decode(args, model, slots, length):
    """A step of slots that have read `length` positions."""
    keys = [stream_key(0, i) for i in range(slots)]
    work = Slots(model, [[5] * length], [keys], [64], slots)

    def step():
        work.advance(1.0, 0, 1.0)
        work.decode()

    work.refill()
    step()
    with profile() as seen:
        logits = work.forward()
    apart = (logits - work.replay()).abs().max() / logits.abs().max()
    assert apart < 0.01, f"captured logits differ by {apart:.2g} of the largest"
    captured = common.seconds(work.replay, 10)
    read = sum(x.nbytes for x in [*model.model.layers.parameters(), model.lm_head.weight])
    read += sum(x.nbytes for x in work.cache.k + work.cache.v) * length / work.cache.room
    names = [event.key for event in seen.key_averages()]
    names = [name for name in names if re.search("flash|fmha|attention|softmax", name)]
    say(
        slots=slots,
        positions=length,
        eager_seconds=common.seconds(work.forward, 10),
        captured_seconds=captured,
        share_of_bandwidth=read / captured / bandwidth(args),
        tokens_per_second=slots / common.seconds(step, 10),
        capture_seconds=common.seconds(lambda: capture(work.forward, model.device)),
        attention=sorted(names, key=lambda name: name.startswith("aten"))[:1],
    )


def bandwidth(args):
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=args.device)
    target = source.clone()
    return 2 * source.nbytes / common.seconds(lambda: target.copy_(source), 5)


def script(command, args):
    """Another benchmark, which prints what it measures."""
    start(f"bench/{command} --device {args.device}", wait=True)


def draw(args):
    common.make_workload(f"{args.out}/workload", 16, 16, 2 * args.new_tokens)
    flags = f"--workload {args.out}/workload --slots 64 --repeats 1"
    script(f"rollout.py --model {args.model} --dtype {args.dtype} {flags}", args)


def update(flags, args):
    size = f"--model {args.model} --new-tokens {args.new_tokens} --steps 1"
    script(f"step.py {size} --dtype {args.dtype} {flags}", args)


def start(command, wait=False):
    """A process of Python. Where it is waited for and fails, this row fails, too."""
    process = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=common.ROOT)
    if wait and process.wait():
        sys.exit(1)
    return process


def small_run(args, name, launch="train.py", wait=True):
    return start(f"{launch} {SMALL_RUN.format(name=name, **vars(args))}", wait)


def fsdp(args):
    """Of one process, and of as many as there are cards."""
    small_run(args, "one")
    for count in sorted({1, torch.cuda.device_count() or 2}):
        launch = f"-m torch.distributed.run --nproc_per_node={count} train.py --fsdp"
        small_run(args, f"fsdp{count}", launch)
        compare(args, f"fsdp{count}")


def resume(args):
    """A run that was killed and went on, beside one that was not."""
    process = small_run(args, "killed", wait=False)
    while process.poll() is None and not Path(args.out, "killed/checkpoints/000001").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()  # its lock ends with it
    start(f"train.py --resume {args.out}/killed", wait=True)
    compare(args, "killed")


def compare(args, name):
    """The weights of a run with those of `one`: how far apart, by how far the latter moved."""
    folders = "small", "one/checkpoints/000003", f"{name}/checkpoints/000003"
    begun, end, other = (
        torch.cat([x.flatten() for x in load_file(path).values()])
        for path in (f"{args.out}/{folder}/model.safetensors" for folder in folders)
    )
    apart = ((end - other).norm() / (end - begun).norm()).item()
    say(run=name, weights_differ_by=apart)
    assert apart <= (1e-3 if args.device == "cpu" else 0.1), "that is more than rounding"


def full(args):
    if args.device == "cpu":
        return say(left_out="without a GPU")
    code = small_run(args, "full", FULL, wait=False).wait()
    log = Path(args.out, "full card.log").read_text()
    say(exit_code=code, last_line=log.splitlines()[-1])
    assert code == 1 and "out of memory" in log and "Traceback" not in log, "not one line, code 1"


ROWS = {
    "card": card,
    "model": model,
    "gap of learner and sampler": partial(update, ""),
    "decoding": decoding,
    "heavy-tailed draw": draw,
    "learning, layers kept": partial(update, "--layers kept"),
    "learning, layers again": partial(update, "--layers again"),
    "LoRA": partial(update, "--lora-rank 16"),
    "float32": partial(update, "--dtype float32"),
    "FSDP": fsdp,
    "resume": resume,
    "full card": full,
}

# ---------------------------------------------------------------------------------------- the table


def measure(args, name, seconds, *more):
    """Run a row, with `more` flags.  -> its log's lines, why it failed or None"""
    log = Path(args.out, f"{name}.log")
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--out", args.out, "--row", name]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    failure = None
    try:
        if code := process.wait(seconds):
            failure = f"exit code {code}"
    except subprocess.TimeoutExpired:
        failure = f"{seconds:.0f} s are over"
    finally:
        with suppress(ProcessLookupError):  # what it has started ends with it, at Ctrl-C too
            os.killpg(process.pid, signal.SIGKILL)
    return log.read_text(errors="replace").splitlines(), failure


def shown(line):
    """What a line of JSON holds."""
    for name, value in json.loads(line).items():
        if isinstance(value, float):
            value = f"{value:.3g}"
        yield f"{name} {value}"


def table(args):
    """Print all rows, and keep them in --out; the exit code is 1 if one has failed."""
    args.out = str(Path(args.out or tempfile.mkdtemp()).resolve())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + args.total, False
    print(f"logs, table.md and rows.jsonl: {args.out}")
    keep(args, "table.md", "| what | measured | seconds | good |\n| --- | --- | --- | --- |")
    for name in ROWS:
        begun = time.monotonic()
        seconds = max(0, min(args.limit, end - begun))
        lines, failure = measure(args, name, seconds)
        if failure and name == "model":  # the hub is too slow
            lines, failure = measure(args, name, seconds, "--model", "")
        found = [line for line in lines if line.startswith("{")]
        for line in found:
            keep(args, "rows.jsonl", json.dumps({"row": name} | json.loads(line)), show=False)
        cells = ["; ".join(shown(line)) for line in found]
        if failure:
            failed = True
            last = squash(lines[-1]).replace("|", "/") if lines else "it has said nothing"
            cells.append(f"{failure}: {last}")
        seconds, good = time.monotonic() - begun, "NO" if failure else "yes"
        keep(args, "table.md", f"| {name} | {'<br>'.join(cells)} | {seconds:.0f} | {good} |")
        if name == "card" and failure:
            sys.exit(last)
    sys.exit(failed)


def keep(args, name, line, show=True):
    """Append a line to a file of --out."""
    with open(Path(args.out, name), "a") as file:
        print(line, file=file)
    if show:
        print(line, flush=True)


# -------------------------------------------------------------------------------------- arithmetic

# GB/s of memory, TFLOP/s of dense bfloat16 products, GiB: the makers' data sheets.
CARDS = {"RTX 4090": (1008, 165, 24), "A100 80 GB": (2039, 312, 80), "H100": (3350, 989, 80)}
# Kernels of a decoded step: of a layer, of one with LoRA, and those beside the layers. Counted on a
# pretended device with the 28 layers of Qwen2.5-1.5B: 549, and 1,333 with LoRA.
KERNELS = 19, 47, 17
LAUNCH = 2e-6  # seconds from one kernel of a graph to the next
MFU = 0.4  # of the peak of products, while learning
COMPLETIONS = 256  # of an update; all have the same length


def expect(card, size, lora, tokens):
    """What a card should need, as text."""
    speed, peak, memory = CARDS[card]
    hidden, inner, layers, heads, kv_heads, vocabulary = common.numbers(size)
    kv = 2 * hidden // heads * kv_heads  # numbers of a token's key and value in one layer
    head = hidden * vocabulary
    met = layers * hidden * (2 * hidden + kv + 3 * inner) + head  # weights that a token meets
    held = met + head * (size == "7b")  # its embedding is not the head
    # bytes: weights, and in full training masters, moments; while learning gradients
    free = memory * 2**30 - 1e9 - (2 if lora else 14) * held
    learner = free - (0 if lora else 4) * held
    joined = 2 * layers * hidden * (hidden + kv + 2 * inner)  # copies, while sampling
    row = 2 * layers * kv * tokens  # of the KV cache
    apart = 3 * (4 * joined > free)  # products of a layer that are not joined
    slots = min(COMPLETIONS, int(free / 2 / row) // 8 * 8)
    kept = 2 * layers * (4 * inner + 6 * hidden)  # a token, if no layer is computed again
    again = learner < 1.25 * UNCHECKPOINTED * kept
    if slots < 8 or learner < tokens * (2 * layers * hidden + kept / layers):
        return "does not fit"

    def step(filled):
        launches = (layers * (KERNELS[lora] + apart) + KERNELS[2]) * LAUNCH
        return (2 * met + slots * row * filled) / (1e9 * speed) + launches

    sampling = -(-COMPLETIONS // slots) * tokens * step(0.5)
    factor = (4 if lora else 6) + 2 * again
    flops = factor * (met + layers * hidden * tokens)  # of a token; the latter is attention
    learning = COMPLETIONS * tokens * flops / (MFU * 1e12 * peak)
    rate = slots / step(1) / 1e3
    times = f"{sampling:.0f} + {learning:.0f} s{' *' * again}"
    return f"{slots}: {1e3 * step(1):.1f} ms, {rate:.1f} k/s; {times}"


def arithmetic():
    print(f"| | {' | '.join(CARDS)} |\n| --- | --- | --- | --- |")
    for size, lora, tokens in product(("0.5b", "1.5b", "7b"), (False, True), (1024, 8192)):
        cells = [expect(card, size, lora, tokens) for card in CARDS]
        print(f"| {size}, {'LoRA' if lora else 'full'}, {tokens} | {' | '.join(cells)} |")


def main():
    flags = {"row": "", "size": "1.5b", "out": "", "limit": 150, "total": 600, "new_tokens": 1024}
    args = common.parse(__doc__, **common.MODEL, **flags, arithmetic=False)
    if args.arithmetic:
        arithmetic()
    elif args.row:
        if args.row not in ("card", "model"):
            args.model = f"{args.out}/model"
        ROWS[args.row](args)
    else:
        table(args)


if __name__ == "__main__":
    main()
